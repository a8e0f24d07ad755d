"""What one forward pass needs of a PackPlan, on the model's device: this rank's chunk and the attention problems.

Travels to every layer as megatron-core's `packed_seq_params`, so that recomputation and every pipeline stage use the
plan of their own micro-batch.
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megabagel.models.attention import AttentionPlan, prepare_attention
from megabagel.models.rotary import rotary_table
from megabagel.packing.chunk import Chunk
from megabagel.packing.plan import PackPlan


@dataclass
class Placement:
    """Where the queries, keys and values of this rank's rows go: straight into attention order where the rank has all
    rows of the pack, else nowhere but to their own row, because they travel first."""

    order: Tensor  # [N] row of the chunk
    inverse: Tensor  # [rows of the chunk], -1 for those that go nowhere
    cos: Tensor  # float32 [N, head_dim / 2]
    sin: Tensor


@dataclass
class Routing(PackedSeqParams):
    """Rows of the whole pack are numbered chunk after chunk, in a chunk und first, then gen, padding included."""

    plan: PackPlan = None
    chunk: Chunk = None
    placement: Placement = None
    order: Tensor = None  # int64 [L], row of the pack of each position in attention order
    inverse: Tensor = None  # int64 [rows of the pack], the way back, -1 for padding
    attention: AttentionPlan = None  # over positions in attention order

    @property
    def stream_lengths(self) -> list[int]:
        """Rows of both streams in this rank's chunk."""
        return [self.chunk.und_length, self.chunk.gen_length]

    def attention_in(self, layer: int) -> AttentionPlan:
        """What computes attention in a decoder layer, counted from 1: the same in all, unless they keep keys."""
        return self.attention


def route(
    plan: PackPlan,
    chunk: Chunk,
    rank: int,
    ranks: int,
    head_dim: int,
    rotary_base: float,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Routing:
    """Derive the routing of `plan` and put it on `device`; `chunk` is chunk `rank` of `ranks`, both on the CPU.

    `dtype` is that of queries, keys and values.
    """
    und, gen = (torch.arange(index.numel()) for index in (plan.und_index, plan.gen_index))
    length = chunk.und_length + chunk.gen_length
    row_of = torch.empty(plan.sequence_length, dtype=torch.int64)
    row_of[plan.und_index] = und // chunk.und_length * length + und % chunk.und_length
    row_of[plan.gen_index] = gen // chunk.gen_length * length + chunk.und_length + gen % chunk.gen_length
    order = row_of[plan.attention_index]
    inverse = torch.full((ranks * length,), -1)
    inverse[order] = torch.arange(order.numel())
    if ranks == 1:
        placed, back, position_ids = order, inverse, plan.position_ids[plan.attention_index]
    else:
        placed = back = torch.arange(length)
        position_ids = torch.zeros(ranks * length, dtype=torch.int64)
        position_ids[row_of] = plan.position_ids
        position_ids = position_ids[rank * length : (rank + 1) * length]
    placement = Placement(
        placed.to(device), back.to(device), *rotary_table(position_ids.to(device), head_dim, rotary_base)
    )
    return Routing(
        plan=plan.to(device),
        chunk=chunk.to(device),
        placement=placement,
        order=order.to(device),
        inverse=inverse.to(device),
        attention=prepare_attention(plan.problems, plan.sequence_length, backend, device, dtype),
    )
