"""What one forward pass needs of a PackPlan, on the model's device: the stream split and the attention problems.

Travels to every layer as megatron-core's `packed_seq_params`, so that recomputation and every pipeline stage use the
plan of their own micro-batch.
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megabagel.models.rotary import rotary_table
from megabagel.models.split_attention import AttentionPlan, plan_attention
from megabagel.packing.plan import CAUSAL, PackPlan


@dataclass
class Routing(PackedSeqParams):
    """Rows of both streams are numbered und first, then gen, padding included: [und_length | gen_length]."""

    plan: PackPlan = None
    attention: AttentionPlan = None
    rotary: tuple[Tensor, Tensor] = None  # cos, sin [und_length + gen_length, 1, head_dim]

    @property
    def stream_lengths(self) -> list[int]:
        return [self.plan.und_length, self.plan.gen_length]


def _problems(plan: PackPlan, row_of: Tensor) -> list[tuple[Tensor, Tensor, bool]]:
    """One problem per split; neighbouring texts of a sample become one, which attends to exactly the same tokens."""
    cu_q, cu_kv = plan.cu_seqlens_q.tolist(), plan.cu_seqlens_kv.tolist()
    modes = plan.split_modes.tolist()
    sample_starts = set(torch.cumsum(plan.sample_lens, 0).tolist())
    kv_rows = row_of[plan.kv_index]
    problems, first = [], 0
    for split, mode in enumerate(modes):
        end = cu_q[split + 1]
        joins_next = split + 1 < len(modes) and mode == modes[split + 1] == CAUSAL and end not in sample_starts
        if not joins_next:
            problems.append((row_of[cu_q[first] : end], kv_rows[cu_kv[split] : cu_kv[split + 1]], mode == CAUSAL))
            first = split + 1
    return problems


def route(plan: PackPlan, head_dim: int, rotary_base: float, device: torch.device) -> Routing:
    """Derive the routing of `plan` (on the CPU) and put it on `device`."""
    row_of = torch.empty(plan.sequence_length, dtype=torch.int64)
    row_of[plan.und_index] = torch.arange(plan.und_index.numel())
    row_of[plan.gen_index] = plan.und_length + torch.arange(plan.gen_index.numel())
    rows = plan.und_length + plan.gen_length
    position_ids = torch.zeros(rows, dtype=torch.int64)
    position_ids[row_of] = plan.position_ids
    attention = plan_attention(_problems(plan, row_of), rows).to(device)
    rotary = rotary_table(position_ids.to(device), head_dim, rotary_base)
    return Routing(plan=plan.to(device), attention=attention, rotary=rotary)
