"""Context parallelism of the core attention: ranks exchange heads for rows (Ulysses, Jacobs et al. 2023).

Before attention a rank holds all its heads on its chunk of rows, inside attention some heads on all rows. Key and value
heads are copied to every rank whose query heads need them, so their number does not limit the number of ranks.
"""

from math import gcd

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor

from megabagel.ops.stream import stream_merge, stream_split


def copied_kv_heads(heads: int, kv_heads: int, ranks: int, device: torch.device) -> Tensor:
    """Key head of every block of query heads, rank after rank, int64; equally many blocks for each rank.

    A block is the largest number of query heads that spans neither two ranks nor two key heads.
    """
    per_rank, per_kv_head = heads // ranks, heads // kv_heads
    block = gcd(per_rank, per_kv_head)
    return torch.arange(0, heads, block, device=device) // per_kv_head


def rows_to_heads(
    qkv: tuple[Tensor, Tensor, Tensor], group: torch.distributed.ProcessGroup, order: Tensor, inverse: Tensor
) -> tuple[Tensor, ...]:
    """q [rows of the chunk, heads, d], k and v [.., kv heads, d] -> the same of all positions with this rank's heads.

    Positions come in `order` (see `Routing`). Each rank gets heads / ranks query heads, and its key heads serve equally
    many of them. With one rank the rows are in order already.
    """
    ranks = group.size()
    if ranks == 1:
        return qkv
    q, k, v = qkv
    rows, heads, d = q.shape
    copies = copied_kv_heads(heads, k.shape[1], ranks, k.device)
    parts = [q, k.index_select(1, copies), v.index_select(1, copies)]
    parts = [part.view(rows, ranks, -1, d) for part in parts]
    sizes = [part.shape[2] for part in parts]
    sent = torch.cat(parts, dim=2).transpose(0, 1).contiguous()  # [ranks, rows, q + k + v heads of a rank, d]
    received = all_to_all(group, sent).view(ranks * rows, -1, d)
    return stream_merge(received, order, inverse).split(sizes, dim=1)


def heads_to_rows(context: Tensor, group: torch.distributed.ProcessGroup, order: Tensor, inverse: Tensor) -> Tensor:
    """The way back: [all positions, this rank's heads, d] -> [rows of the chunk, heads of all ranks, d]; zeros in
    padding rows."""
    rows = stream_split(context, inverse, order)
    ranks = group.size()
    if ranks == 1:
        return rows
    _, heads, d = rows.shape
    received = all_to_all(group, rows.contiguous()).view(ranks, -1, heads, d)
    return received.transpose(0, 1).reshape(-1, ranks * heads, d)
