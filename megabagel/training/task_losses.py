"""The losses of one training step apart: by group of data and by flow time.

Looked at in passing, while the step is trained; `loss_table.py` adds up, `step.py` sums over ranks.
"""

from collections.abc import Sequence

from torch import Tensor

from megabagel.config.schema import Config
from megabagel.data.pack import Pack
from megabagel.models.heads import ChunkLosses
from megabagel.packing.plan import PackPlan
from megabagel.runtime.distributed import Layout
from megabagel.training.loss_table import LossTable

_TOTALS = ("ce", "mse")  # which the step reports by another way
_DERIVED = ("loss", "perplexity")


class TaskLosses:
    """Of the step of these packs; one per step. `groups`: names of all groups of data."""

    def __init__(self, groups: Sequence[str], packs: Sequence[Pack], config: Config, layout: Layout) -> None:
        self._training = config.training
        self._groups = {id(pack.plan): pack.groups for pack in packs}
        self._table = LossTable(
            groups,
            config.model.timestep_shift,
            layout,
            config.parallel.sequence_parallel,
            config.training.ce_loss_reweighting,
        )

    def add(self, plan: PackPlan, losses: ChunkLosses) -> None:
        """Of a micro-batch; see `LossTable.add`."""
        self._table.add(plan, self._groups[id(plan)], losses)

    def sums(self) -> Tensor:
        """float64 [n] of this rank's rows, to be summed over all ranks of the last stage."""
        return self._table.sums().flatten()

    def take(self, sums: Tensor) -> None:
        """[n] summed over those ranks."""
        self._table.take(sums)

    def values(self) -> dict[str, float | None]:
        """`groups/GROUP/ce`, `groups/GROUP/mse` and `mse_t0.0-0.1` ...: means as the step's total is one; None where no
        row carries that loss. Valid on the last stage after `take`."""
        values = self._table.values(self._training)
        return {name: v for name, v in values.items() if name not in _TOTALS and name.split("/")[-1] not in _DERIVED}
