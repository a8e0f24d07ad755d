"""Steps whose loss or gradient is not finite: nothing is learnt from them; who and what was it, and when to stop.

It looks closer only when a step has failed. Whether one has is told by the gradient norm, see `optimizer.update`.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megabagel.data.pack import Pack
from megabagel.runtime import events
from megabagel.runtime.distributed import Layout
from megabagel.runtime.give_up import GiveUp

logger = logging.getLogger(__name__)

FOLDER = "nonfinite"  # in the run folder
_STEPS_KEPT = 5  # of a run, whose packs are written
_SAMPLES_NAMED = 3  # in a sentence


@dataclass(frozen=True)
class _Verdict:
    """Of one rank about its own part of a failed step."""

    replica: int
    packs: list[int]  # micro-batches whose loss is not finite, on ranks that know losses
    gradient: bool  # its own gradients, before they were summed over replicas, are not finite
    shard: bool  # what it holds of their sum is not


class NonfiniteSteps:
    """Counts failed steps of a run and reports each; every rank has one and makes the same calls."""

    def __init__(self, run_dir: str | Path, patience: int, layout: Layout) -> None:
        """`patience`: failed steps in a row after which the run gives up."""
        self._run_dir, self._patience, self._layout = Path(run_dir), patience, layout
        self.total, self.in_a_row = 0, 0

    def passed(self) -> None:
        """The step was finite."""
        self.in_a_row = 0

    def failed(
        self,
        step: int,
        stages: list[DistributedDataParallel],
        packs: list[Pack],
        losses: Tensor | None,
        config_yaml: str,
    ) -> None:
        """Report step number `step`, whose gradients are still in the stages' buffers.

        `losses` [packs, ...]: this rank's shares, before sums over ranks; None on ranks that know none. Raises GiveUp
        on all ranks after too many in a row.
        """
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        verdicts = _gather(_verdict(self._layout.dp_rank, stages, losses))
        what, ranks = _culprits(verdicts)
        replicas = {verdicts[rank].replica for rank in ranks}
        bad = sorted({n for v in verdicts if v.replica == self._layout.dp_rank for n in v.packs})
        bad = bad or list(range(len(packs)))  # which one it was is unknown
        mine = []
        if self._layout.is_source and self._layout.dp_rank in replicas:
            mine = [sample for number in bad for sample in _samples(packs[number])]
            if self.total <= _STEPS_KEPT:
                self._write(step, {n: packs[n] for n in bad}, losses, config_yaml)
        samples = [sample for of_rank in _gather(mine) for sample in of_rank]
        sentence = f"step {step}: the {what} is not finite on {_ranks(ranks)}, {_named(samples)}"
        if self._layout.rank == 0:
            file = str(_folder(step)) if self.total <= _STEPS_KEPT else None
            details = {"what": what, "ranks": ranks, "samples": samples, "in_a_row": self.in_a_row, "file": file}
            events.record(self._run_dir, "nonfinite", step=step, **details)
            print(f"{sentence}: its update is skipped ({self.total} such steps so far)", flush=True)
        if self.in_a_row >= self._patience:
            raise GiveUp(
                f"{sentence}; this was the {self.in_a_row}th step in a row (faults.nonfinite_patience), nothing was "
                f"learnt from them. tools/replay_step.py shows where the first ones in {self._run_dir / FOLDER} break; "
                "remove the samples, or go back to an older checkpoint or a lower learning rate."
            )

    def state_dict(self) -> dict[str, float]:
        """Numbers for a checkpoint."""
        return {"nonfinite_steps": self.total, "nonfinite_in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state`, in which other numbers may be and these may be missing."""
        self.total = int(state.get("nonfinite_steps", 0))
        self.in_a_row = int(state.get("nonfinite_in_a_row", 0))

    def _write(self, step: int, packs: dict[int, Pack], losses: Tensor | None, config_yaml: str) -> None:
        """What tools/replay_step.py needs, by the rank that has the pictures."""
        file = self._run_dir / _folder(step) / f"rank{self._layout.rank}.pt"
        content = {
            "step": step,
            "packs": packs,
            "losses": None if losses is None else losses.cpu(),
            "config_yaml": config_yaml,
        }
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, file)
        except OSError as error:
            logger.warning("rank %d: %s could not be written (%s)", self._layout.rank, file, error.strerror or error)


def finite_or_none(value: float | None) -> float | None:
    """For logs, which are JSON."""
    return value if value is not None and math.isfinite(value) else None


def _folder(step: int) -> Path:
    return Path(FOLDER) / f"step_{step:07d}"


def _verdict(replica: int, stages: list[DistributedDataParallel], losses: Tensor | None) -> _Verdict:
    packs = [] if losses is None else (~losses.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    own = shard = False
    for buffer in (b for stage in stages for b in [*stage.buffers, *stage.expert_parallel_buffers]):
        rank, ranks = buffer.data_parallel_group.rank(), buffer.data_parallel_group.size()
        for bucket in buffer.buckets:
            parts = bucket.grad_data.chunk(ranks)
            shard |= not parts[rank].isfinite().all()
            # reducing gradients overwrites a rank's own shard alone: the rest is still what the rank computed
            own |= any(not part.isfinite().all() for n, part in enumerate(parts) if n != rank or ranks == 1)
    return _Verdict(replica, packs, bool(own), bool(shard))


def _culprits(verdicts: list[_Verdict]) -> tuple[str, list[int]]:
    """Loss or gradient, and the ranks where it was not finite before anything was summed over replicas."""
    replicas = {verdict.replica for verdict in verdicts if verdict.packs}
    if replicas:  # experts that replicas share get gradients of all their tokens
        own = [bool(v.packs) or (v.gradient and v.replica in replicas) for v in verdicts]
        return "loss", [rank for rank, is_own in enumerate(own) if is_own]
    own = [rank for rank, verdict in enumerate(verdicts) if verdict.gradient]
    return "gradient", own or [rank for rank, verdict in enumerate(verdicts) if verdict.shard]


def _samples(pack: Pack) -> list[dict]:
    described = zip(pack.groups, pack.keys, pack.origins, strict=True)
    return [{"group": group, "key": list(key), "origin": origin} for group, key, origin in described]


def _gather(value: object) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _named(samples: list[dict]) -> str:
    named = "; ".join(f"{s['group']} {s['origin']}" for s in samples[:_SAMPLES_NAMED])
    return f"{len(samples)} samples ({named}{'; ...' if len(samples) > _SAMPLES_NAMED else ''})"
