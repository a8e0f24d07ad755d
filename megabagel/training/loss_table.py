"""Sums of losses by group of data and by flow time, from the losses of single rows.

Every rank adds up the rows that it alone reports; `reduce` makes the sums those of all. What is read and when is not
decided here.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megabagel.config.schema import TrainingConfig
from megabagel.models.flow import flow_times
from megabagel.models.heads import ChunkLosses
from megabagel.models.loss_rows import loss_rows
from megabagel.packing.chunk import chunk_of
from megabagel.packing.plan import PackPlan
from megabagel.runtime.distributed import Layout

TIME_BINS = 10  # of equal width, over times 0 .. 1


class LossTable:
    """Of a model with that timestep shift. `groups`: names of the groups of data. `reweighting`: the cross-entropy of
    tokens counts by their weights, as under `training.ce_loss_reweighting`."""

    def __init__(
        self,
        groups: Sequence[str],
        timestep_shift: float,
        layout: Layout,
        sequence_parallel: bool,
        reweighting: bool = False,
    ) -> None:
        self._numbers = {name: number for number, name in enumerate(groups)}
        self._shift, self._layout, self._sequence_parallel = timestep_shift, layout, sequence_parallel
        self._reweighting = reweighting
        self._sums = torch.zeros(2 * len(groups) + TIME_BINS, 2, dtype=torch.float64)  # of losses, number of rows
        self._added: list[tuple[Tensor, Tensor, Tensor]] = []  # places, losses, weights; not yet in the sums

    def add(self, plan: PackPlan, groups: Sequence[str], losses: ChunkLosses) -> None:
        """A pack's losses on a rank of the last stage; their device is not waited for. `plan` is on the CPU; `groups`:
        of each of its samples."""
        rank, ranks = self._layout.tp_rank, self._layout.tp_size
        chunk = chunk_of(plan, self._layout.cp_rank, self._layout.cp_size)
        # -1: the text that fills an empty pack, which has no row with a loss
        of_samples = torch.tensor([self._numbers.get(group, -1) for group in groups])
        ends = plan.sample_lens.cumsum(0)
        if rank == 0:  # all tensor-parallel ranks report the same
            positions = plan.und_index[chunk.ce_rows + self._layout.cp_rank * chunk.und_length]
            places = of_samples[torch.searchsorted(ends, positions, right=True)]
            self._count(places, losses.ce_rows, chunk.ce_weights if self._reweighting else None)
        if rank == 0 or self._sequence_parallel:
            shares = (rank, ranks) if self._sequence_parallel else (0, 1)
            tokens = loss_rows(chunk, *shares).latents + chunk.latents.start
            positions = plan.gen_index[tokens]
            of_rows = of_samples[torch.searchsorted(ends, positions, right=True)]
            self._count(len(self._numbers) + of_rows, losses.mse_rows)
            bins = (flow_times(plan.timesteps[tokens], self._shift) * TIME_BINS).long().clamp(max=TIME_BINS - 1)
            self._count(2 * len(self._numbers) + bins, losses.mse_rows)

    def sums(self) -> Tensor:
        """float64 [places, 2] of the rows that this rank added, on the device of their losses."""
        if self._added:
            device = self._added[0][1].device
            places, losses, weights = (torch.cat(parts) for parts in zip(*self._added, strict=True))
            weights = weights.to(device, torch.float64)
            of_rows = torch.stack([losses.double() * weights, weights], dim=1)
            self._sums = self._sums.to(device).index_add_(0, places.to(device), of_rows)
            self._added = []
        return self._sums

    def take(self, sums: Tensor) -> None:
        """Go on with those of all ranks; [places, 2] in any shape."""
        self._sums = sums.reshape(self._sums.shape).cpu()

    def reduce(self) -> None:
        """Sum over all ranks, of which each row is reported by one; every rank must call it."""
        sums = self.sums().to(self._layout.device)
        dist.all_reduce(sums)
        self.take(sums)

    def values(self, training: TrainingConfig) -> dict[str, float | None]:
        """Means by the names of `metric_names`, None where no row carries that loss."""
        number = len(self._numbers)
        ce, mse, bins = self.sums().split([number, number, TIME_BINS])
        values = _means(ce.sum(dim=0), mse.sum(dim=0), training)
        values |= {_bin_name(place): _mean(row) for place, row in enumerate(bins)}
        for group, place in self._numbers.items():
            values |= {f"groups/{group}/{name}": v for name, v in _means(ce[place], mse[place], training).items()}
        return values

    def _count(self, places: Tensor, losses: Tensor, weights: Tensor | None = None) -> None:
        self._added.append((places, losses, torch.ones(len(places)) if weights is None else weights))


def metric_names(groups: Sequence[str]) -> list[str]:
    """`loss`: training.ce_weight * ce + training.mse_weight * mse. `ce`: nats per token, `perplexity`: exp of it.
    `mse`: of the velocity, mean over latent channels; `mse_t0.0-0.1` ...: of times in that range, the later one
    excluded. `groups/GROUP/...`: of one group."""
    names = ["loss", "ce", "perplexity", "mse"]
    of_groups = [f"groups/{group}/{name}" for group in groups for name in names]
    return [*names, *(_bin_name(place) for place in range(TIME_BINS)), *of_groups]


def _bin_name(place: int) -> str:
    return f"mse_t{place / TIME_BINS:.1f}-{(place + 1) / TIME_BINS:.1f}"


def _means(ce: Tensor, mse: Tensor, training: TrainingConfig) -> dict[str, float | None]:
    """Of sums [2] each."""
    mean_ce, mean_mse = _mean(ce), _mean(mse)
    parts = [(training.ce_weight, mean_ce), (training.mse_weight, mean_mse)]
    known = [weight * value for weight, value in parts if value is not None]
    perplexity = None if mean_ce is None else torch.tensor(mean_ce, dtype=torch.float64).exp().item()
    return {"loss": sum(known) if known else None, "ce": mean_ce, "perplexity": perplexity, "mse": mean_mse}


def _mean(sums: Tensor) -> float | None:
    total, rows = sums.tolist()
    return total / rows if rows else None
