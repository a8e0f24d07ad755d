"""The moving average in a checkpoint: tensors under `ema.<key of the parameter>`, cut as the optimizer's state is."""

from typing import Protocol

from torch import Tensor

PREFIX = "ema."


class Average(Protocol):
    """What is needed of the moving average (`megabagel.training.ema.ShardedEma`)."""

    def by_parameter(self) -> dict[Tensor, tuple[Tensor, int, int]]:
        """Model parameter -> (this rank's shard, start, end in the flat parameter)."""

    def reset(self) -> None:
        """Start again from the present weights."""
