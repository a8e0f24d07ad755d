"""Brings rows that are spread over the ranks of a group to the ranks that want them, in one all-to-all.

Every rank knows who holds and who wants what, so nothing is asked first. It has no backward pass of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Exchange:
    """One rank's part. Lists have an entry per rank of the group; int64 on the CPU."""

    send: list[Tensor]  # which of my rows it gets, in the order of its wishes
    receive: list[Tensor]  # places in my result of the rows that it sends
    length: int  # rows of my result


def plan_exchange(owners: Tensor, wanted: Sequence[Tensor], rank: int) -> Exchange:
    """`owners` int64 [N]: rank that holds each row; it holds them in ascending order. `wanted`: per rank, the rows that
    it wants, in the order of its result."""
    place = torch.empty_like(owners)
    mine = (owners == rank).nonzero()[:, 0]
    place[mine] = torch.arange(len(mine))
    wishes = {id(rows): rows for rows in wanted}  # many ranks want the same
    sends = {key: place[rows[owners[rows] == rank]] for key, rows in wishes.items()}
    sources = owners[wanted[rank]]
    counts = torch.bincount(sources, minlength=len(wanted)).tolist()
    return Exchange(
        send=[sends[id(rows)] for rows in wanted],
        receive=list(sources.argsort(stable=True).split(counts)),
        length=len(sources),
    )


def exchange(rows: Tensor, plan: Exchange, group: dist.ProcessGroup) -> Tensor:
    """rows [n, h] of this rank -> [plan.length, h]: zeros, and what arrives added in its places. All ranks call it."""
    sent = rows.index_select(0, torch.cat(plan.send).to(rows.device))
    if group.size() == 1:
        received = sent
    else:
        counts = [len(places) for places in plan.receive]
        received = sent.new_empty(sum(counts), rows.shape[1])
        dist.all_to_all_single(received, sent, counts, [len(places) for places in plan.send], group=group)
    result = rows.new_zeros(plan.length, rows.shape[1])
    return result.index_add_(0, torch.cat(plan.receive).to(rows.device), received)
