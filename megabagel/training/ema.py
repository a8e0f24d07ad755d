"""Exponential moving average of the weights: float32 shards beside the distributed optimizer's main parameters.

Each data-parallel rank holds the average of its own shard only. A frozen parameter is its own average.
"""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megabagel.runtime.overlap import publish_main_parameters, whole_parameters


class ShardedEma:
    """The average of all weights that an optimizer of `build_optimizer` trains; starts as a copy of them."""

    def __init__(self, optimizer: MegatronOptimizer):
        self.optimizer = optimizer
        self.optimizers: list[DistributedOptimizer] = [
            part for part in optimizer.chained_optimizers if not part.is_stub_optimizer
        ]
        self.shards: list[Tensor] = []
        self.reset()

    def reset(self) -> None:
        """Start again from the present weights."""
        self.shards = [main.detach().clone() for main in self._main_shards()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average <- decay * average + (1 - decay) * weights; call after each optimizer step."""
        main = self._main_shards()
        if main:
            torch._foreach_mul_(self.shards, decay)
            torch._foreach_add_(self.shards, main, alpha=1.0 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's parameters are the average, in their own dtype and whole on every rank; do not train."""
        with whole_parameters(self.optimizer.model_chunks):
            self._swap()
            try:
                yield
            finally:
                self._swap()

    def by_parameter(self) -> dict[Tensor, tuple[Tensor, int, int]]:
        """Model parameter -> (this rank's shard [end - start] of its average, start, end in the flat parameter)."""
        shards = {id(main): shard for main, shard in zip(self._main_shards(), self.shards, strict=True)}
        table = {}
        for optimizer in self.optimizers:
            for parameter, (group, order) in optimizer.model_param_group_index_map.items():
                main = optimizer.optimizer.param_groups[group]["params"][order]
                span = optimizer._get_model_param_range_map(parameter)["param"]
                table[parameter] = (shards[id(main)], span.start, span.end)
        return table

    def _main_shards(self) -> list[Tensor]:
        return [main for part in self.optimizers for group in part.optimizer.param_groups for main in group["params"]]

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange average and main parameters, and bring the model's parameters in line with the latter."""
        for main, shard in zip(self._main_shards(), self.shards, strict=True):
            weights = main.clone()
            main.copy_(shard)
            shard.copy_(weights)
        publish_main_parameters(self.optimizer)
