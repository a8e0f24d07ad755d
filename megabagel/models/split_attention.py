"""Softmax attention over variable-length problems (splits): grouping them, and the SDPA path that runs anywhere.

A problem is (query rows, key rows, causal or full). It knows nothing of modalities, projections or parallelism.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class ProblemGroup:
    """`count` problems of equal shape, `lq` queries and `lk` keys each; `mask` bool [lq, lk] or None."""

    count: int
    lq: int
    lk: int
    mask: Tensor | None
    causal: bool  # square and causal: needs no mask


@dataclass(frozen=True)
class AttentionPlan:
    """Every problem of a packed sequence, grouped by shape so that equal shapes run as one batch.

    Queries and keys of all groups are gathered once: `q_rows` and `kv_rows` int64 list them group after group.
    `inverse` [rows] says where each row's result stands in that order; rows in no problem (padding) point at one extra
    zero row behind it.
    """

    groups: list[ProblemGroup]
    q_rows: Tensor
    kv_rows: Tensor
    inverse: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [rows, heads, d], k and v [rows, kv heads, d] -> [rows, heads, d]."""
        return split_attention(q, k, v, self)

    def to(self, device: torch.device) -> "AttentionPlan":
        groups = [g if g.mask is None else replace(g, mask=g.mask.to(device)) for g in self.groups]
        return AttentionPlan(groups, *(t.to(device) for t in (self.q_rows, self.kv_rows, self.inverse)))


def plan_attention(problems: Sequence[tuple[Tensor, Tensor, bool]], rows: int) -> AttentionPlan:
    """Group (query rows [lq], key rows [lk], causal) problems over a tensor of `rows` rows; at least one problem.

    A causal problem is aligned bottom-right: its last query sees all keys.
    """
    by_shape: dict[tuple[int, int, bool], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for q_rows, kv_rows, causal in problems:
        by_shape[q_rows.numel(), kv_rows.numel(), causal].append((q_rows, kv_rows))
    groups = []
    for (lq, lk, causal), members in by_shape.items():
        mask = torch.ones(lq, lk, dtype=torch.bool).tril(lk - lq) if causal and lq != lk else None
        groups.append(ProblemGroup(len(members), lq, lk, mask, causal and lq == lk))
    in_order = [member for members in by_shape.values() for member in members]
    q_rows, kv_rows = (torch.cat(column) for column in zip(*in_order, strict=True))
    inverse = torch.full((rows,), q_rows.numel(), dtype=torch.int64)
    inverse[q_rows] = torch.arange(q_rows.numel())
    return AttentionPlan(groups, q_rows, kv_rows, inverse)


def split_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """q [rows, heads, d], k and v [rows, kv_heads, d] (heads a multiple of kv_heads) -> [rows, heads, d].

    Rows in no problem get zeros. Scale 1/sqrt(d).
    """
    heads, d = q.shape[1:]
    repeats = heads // k.shape[1]
    queries = q.index_select(0, plan.q_rows).split([g.count * g.lq for g in plan.groups])
    sizes = [g.count * g.lk for g in plan.groups]
    keys, values = (t.index_select(0, plan.kv_rows).repeat_interleave(repeats, dim=1).split(sizes) for t in (k, v))
    results = []
    for g, *qkv in zip(plan.groups, queries, keys, values, strict=True):
        batch = (t.view(g.count, -1, heads, d).transpose(1, 2) for t in qkv)
        out = scaled_dot_product_attention(*batch, attn_mask=g.mask, is_causal=g.causal)  # [count, heads, lq, d]
        results.append(out.transpose(1, 2).reshape(-1, heads, d))
    results.append(q.new_zeros(1, heads, d))
    return torch.cat(results).index_select(0, plan.inverse)


def prepare_attention(problems: Tensor, length: int, backend: str, device: torch.device) -> AttentionPlan:
    """The problems [P, 5] of a plan over `length` positions in attention order, ready on `device`."""
    rows = torch.arange(length)
    listed = [
        (rows[q : q + n], torch.cat([rows[prefix : prefix + m], rows[q : q + n]]), bool(causal))
        for q, n, prefix, m, causal in problems.tolist()
    ]
    return plan_attention(listed, length).to(device)
