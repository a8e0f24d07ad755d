"""What one forward pass needs of a PackPlan, on the model's device: this rank's chunk and the attention problems.

Travels to every layer as megatron-core's `packed_seq_params`, so that recomputation and every pipeline stage use the
plan of their own micro-batch.
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megabagel.models.rotary import rotary_table
from megabagel.models.split_attention import AttentionPlan, plan_attention
from megabagel.packing.chunk import Chunk
from megabagel.packing.plan import PackPlan


@dataclass
class Routing(PackedSeqParams):
    """Rows of the whole pack are numbered chunk after chunk, in a chunk und first, then gen, padding included."""

    plan: PackPlan = None
    chunk: Chunk = None
    attention: AttentionPlan = None  # over the rows of all chunks
    rotary: tuple[Tensor, Tensor] = None  # cos, sin [rows of the chunk, 1, head_dim]

    @property
    def stream_lengths(self) -> list[int]:
        """Rows of both streams in this rank's chunk."""
        return [self.chunk.und_length, self.chunk.gen_length]


def _problems(plan: PackPlan, row_of: Tensor) -> list[tuple[Tensor, Tensor, bool]]:
    """(query rows, key rows, causal) of each problem of the plan."""
    rows = row_of[plan.attention_index]
    return [
        (rows[q : q + n], torch.cat([rows[prefix : prefix + m], rows[q : q + n]]), bool(causal))
        for q, n, prefix, m, causal in plan.problems.tolist()
    ]


def route(
    plan: PackPlan, chunk: Chunk, rank: int, ranks: int, head_dim: int, rotary_base: float, device: torch.device
) -> Routing:
    """Derive the routing of `plan` and put it on `device`; `chunk` is chunk `rank` of `ranks`, both on the CPU."""
    und, gen = (torch.arange(index.numel()) for index in (plan.und_index, plan.gen_index))
    length = chunk.und_length + chunk.gen_length
    row_of = torch.empty(plan.sequence_length, dtype=torch.int64)
    row_of[plan.und_index] = und // chunk.und_length * length + und % chunk.und_length
    row_of[plan.gen_index] = gen // chunk.gen_length * length + chunk.und_length + gen % chunk.gen_length
    rows = ranks * length
    position_ids = torch.zeros(rows, dtype=torch.int64)
    position_ids[row_of] = plan.position_ids
    mine = position_ids[rank * length : (rank + 1) * length]
    return Routing(
        plan=plan.to(device),
        chunk=chunk.to(device),
        attention=plan_attention(_problems(plan, row_of), rows).to(device),
        rotary=rotary_table(mine.to(device), head_dim, rotary_base),
    )
