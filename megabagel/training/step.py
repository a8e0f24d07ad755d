"""One training step: global loss counts, megatron-core's pipeline schedule over the micro-batches, the update.

Losses are divided by counts of the whole step, so the result does not depend on the layout or the micro-batch split.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megabagel.config.schema import TrainingConfig
from megabagel.models.embeddings import StreamInputs
from megabagel.models.heads import ChunkLosses
from megabagel.packing.plan import PackPlan
from megabagel.training.expert_losses import set_auxiliary_loss_scale
from megabagel.training.task_losses import TaskLosses

MicroBatch = tuple[PackPlan, StreamInputs | None]
_SAMPLES = 4  # column of the samples among those that are counted of every plan


@dataclass(frozen=True)
class LossCounts:
    """Divisors of a step's losses over all micro-batches and data-parallel ranks, and what else the step holds."""

    ce: float  # loss tokens, or the sum of their weights under `ce_loss_reweighting`
    ce_tokens: int
    mse_tokens: int
    tokens: int
    samples: int
    content: dict[str, float] = field(default_factory=dict)  # sums of what was given with each plan


def count(
    plans: list[PackPlan],
    training: TrainingConfig,
    device: torch.device,
    blanks: int = 0,
    contents: Sequence[Mapping[str, float]] | None = None,
) -> LossCounts:
    """Sum over this replica's plans and all data-parallel ranks; every rank must call it.

    `blanks`: how many of the samples only stand in for missing ones. `contents`: more to sum up, of each plan.
    """
    contents = contents or [{}] * len(plans)
    per_plan = [
        (
            plan.ce_weights.double().sum().item() if training.ce_loss_reweighting else plan.ce_rows.numel(),
            plan.ce_rows.numel(),
            plan.mse_rows.numel(),
            plan.sequence_length,
            plan.sample_lens.numel(),
            *content.values(),
        )
        for plan, content in zip(plans, contents, strict=True)
    ]
    total = torch.tensor(per_plan, dtype=torch.float64, device=device).sum(dim=0)
    total[_SAMPLES] -= blanks
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    ce, *integers = total[: _SAMPLES + 1].tolist()
    content = dict(zip(contents[0], total[_SAMPLES + 1 :].tolist(), strict=True))
    return LossCounts(ce, *(int(n) for n in integers), content)


@dataclass(frozen=True)
class Losses:
    """Global means of a step, None where no token carries that loss. Valid on the last pipeline stage only."""

    ce: float | None
    mse: float | None
    of_packs: Tensor | None = None  # [micro-batches, 2] this rank's shares of both, on the device

    @property
    def are_finite(self) -> bool:
        """True where none is known."""
        return all(math.isfinite(value) for value in (self.ce, self.mse) if value is not None)


def _loss(losses: ChunkLosses, counts: LossCounts, training: TrainingConfig) -> tuple[Tensor, Tensor, dict]:
    """This rank's share of the step's loss for a micro-batch, in the form megatron-core's schedules expect."""
    ce = losses.ce / max(counts.ce, 1e-12)
    mse = losses.mse / max(counts.mse_tokens, 1)
    loss = training.ce_weight * ce + training.mse_weight * mse
    tokens = torch.ones((), dtype=torch.int, device=loss.device)  # demanded by the schedule; the loss is normalised
    return loss, tokens, {"ce": ce.detach(), "mse": mse.detach()}


def forward_backward(
    stages: list[nn.Module],
    micro_batches: list[MicroBatch],
    counts: LossCounts,
    training: TrainingConfig,
    rows: int,
    tasks: TaskLosses | None = None,
) -> Losses:
    """Run all micro-batches through the pipeline; gradients are left in the DDP buffers, summed over data
    and context parallel.

    `rows`: padded rows [und | gen] of every pack, the length of the tensor that travels between stages. `tasks`: takes
    the step's losses apart, if given.
    """

    replicas = parallel_state.get_data_parallel_world_size()
    set_auxiliary_loss_scale(len(micro_batches) * replicas, next(stages[0].parameters()).device)

    def forward_step(batches: Iterator[MicroBatch], stage: nn.Module):
        plan, inputs = next(batches)

        def loss(output: ChunkLosses) -> tuple[Tensor, Tensor, dict]:
            if tasks:
                tasks.add(plan, output)
            return _loss(output, counts, training)

        return stage(plan, inputs), loss

    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        # every interleaved stage of a rank goes through all micro-batches
        data_iterator=[iter(micro_batches) for _ in stages] if len(stages) > 1 else iter(micro_batches),
        model=stages,
        num_microbatches=len(micro_batches),
        seq_length=rows,
        micro_batch_size=1,
        forward_only=False,
    )
    if not reports:
        return Losses(None, None)
    of_packs = torch.stack([torch.stack([r["ce"], r["mse"]]) for r in reports])
    sums = of_packs.double().sum(dim=0)
    if parallel_state.get_tensor_model_parallel_rank() > 0:  # all of a tensor-parallel group report the same
        sums.zero_()
    if tasks:
        sums = torch.cat([sums, tasks.sums().to(sums.device)])
    dist.all_reduce(sums, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    ce, mse, *_ = sums.tolist()
    if tasks:
        tasks.take(sums[2:])
    return Losses(ce if counts.ce_tokens else None, mse if counts.mse_tokens else None, of_packs)
