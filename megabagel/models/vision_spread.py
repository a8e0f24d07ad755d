"""The vision tower of one micro-batch spread over the tensor- and context-parallel ranks of a pipeline stage.

Each rank runs the tower on its own pictures only; features then go to the ranks that hold their rows, and gradients
come back. Weight gradients are sums over a rank's own pictures: `mark_partial` says so to whoever completes them.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from megabagel.config.schema import VisionConfig
from megabagel.models.costs import vision_flops
from megabagel.models.vision import VisionTower
from megabagel.packing.plan import PackPlan
from megabagel.runtime.balance import spread
from megabagel.runtime.exchange import Exchange, exchange, plan_exchange


def mark_partial(tower: nn.Module) -> None:
    """Mark weights whose gradient must be summed over tensor-parallel ranks though they are replicated there.

    Context-parallel ranks need no mark: every gradient is summed over them together with the data-parallel ranks.
    """
    for parameter in tower.parameters():
        parameter.sum_over_tensor_parallel = True


def is_partial(parameter: Tensor) -> bool:
    """Whether the parameter is marked."""
    return getattr(parameter, "sum_over_tensor_parallel", False)


def image_owners(seqlens: list[int], config: VisionConfig, ranks: int) -> list[int]:
    """Rank (of tensor x context parallel ones) that runs the tower on each picture of a pack."""
    return spread([vision_flops(config, tokens) for tokens in seqlens], ranks)


def chunk_tokens(plan: PackPlan, chunks: int) -> list[Tensor]:
    """Which ViT tokens of `plan` (on the CPU) lie in each context-parallel chunk."""
    chunk = plan.vit_rows // (plan.und_length // chunks)
    return [(chunk == index).nonzero()[:, 0] for index in range(chunks)]


class _Spread(torch.autograd.Function):
    """Rows to the ranks that want them; gradients back from one of the ranks that hold equal copies."""

    @staticmethod
    def forward(ctx, features: Tensor, there: Exchange, back: Exchange, group: dist.ProcessGroup) -> Tensor:
        ctx.back, ctx.group = back, group
        return exchange(features, there, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(gradient, ctx.back, ctx.group), None, None, None


def _backward(there: Exchange, rank: int, tp_size: int, rows: int) -> Exchange:
    """The way back. Tensor-parallel ranks compute the same gradient for the rows of a chunk: only the one with the
    owner's own tensor-parallel number returns it."""

    def only_peers(lists: list[Tensor]) -> list[Tensor]:
        return [part if other % tp_size == rank % tp_size else part[:0] for other, part in enumerate(lists)]

    return Exchange(send=only_peers(there.receive), receive=only_peers(there.send), length=rows)


def spread_features(
    tower: VisionTower, patches: Tensor, plan: PackPlan, group: dist.ProcessGroup, tp_size: int
) -> Tensor:
    """patches [m, p*p*3] of the pictures that `image_owners` gives this rank; `plan` of the whole pack, on the CPU.
    -> [n + 1, hidden]: features of the n ViT tokens of this rank's chunk in order, then a row of zeros that keeps the
    tower in the graph. Every rank of `group` calls it.

    `group`: the tensor- and context-parallel ranks of this stage, tensor-parallel ones side by side.
    """
    rank, ranks = group.rank(), group.size()
    seqlens = plan.vit_seqlens.tolist()
    owners = torch.tensor(image_owners(seqlens, tower.config, ranks), dtype=torch.int64)
    mine = [tokens for tokens, owner in zip(seqlens, owners.tolist(), strict=True) if owner == rank]
    row_owners = owners.repeat_interleave(plan.vit_seqlens)
    own = (row_owners == rank).nonzero()[:, 0]
    # a dummy patch behind the own ones: every weight is used on every step, whatever the pack holds
    features = tower(
        pad(patches, (0, 0, 0, 1)),
        pad(plan.vit_position_ids[own], (0, 1)).to(patches.device),
        [*mine, 1],
    )
    wanted = [tokens for tokens in chunk_tokens(plan, ranks // tp_size) for _ in range(tp_size)]
    there = plan_exchange(row_owners, wanted, rank)
    there = Exchange(there.send, there.receive, there.length + 1)
    return _Spread.apply(features, there, _backward(there, rank, tp_size, len(features)), group)
