"""Attention on the CPU that computes exactly the visible blocks: the reference and the default there.

A problem is one rectangle over its prefix and its own rows, put together where they are not one run; a causal one is a
rectangle over its prefix and a triangle on its own rows. The parts of a query are merged by their log-sum-exp, and the
backward pass of each uses the merged result (FlashAttention).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megabagel.models.attention.sdpa_short import ShortSamples, split_samples

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Block(NamedTuple):
    """Queries and keys, the rows of one or two runs, that see each other; with `causal` both are the same rows,
    lower-triangular.

    `merges`: the queries have been in an earlier block.
    """

    queries: slice
    keys: tuple[slice, ...]
    causal: bool
    merges: bool


class BlockPlan:
    """A table of problems [P, 5] (see `packing.plan.Problem`): short samples side by side (`sdpa_short.py`), and of all
    others the blocks, one call of the kernel for each.

    A call costs some 20 us beside its work: for long samples that is nothing.
    """

    def __init__(self, problems: np.ndarray):
        short, others = split_samples(problems)
        self.short = ShortSamples(short) if len(short) > 1 else None
        if self.short is None:
            others = problems
        self.blocks = [block for problem in others.tolist() for block in _blocks(*problem)]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [L, heads, d], k and v [L, kv heads, d] -> [L, heads, d] in float64, float32 or bfloat16."""
        return _BlockAttention.apply(q, k, v, self.blocks, self.short)


def _blocks(start: int, length: int, prefix_start: int, prefix_length: int, causal: int) -> list[Block]:
    rows = slice(start, start + length)
    prefix = slice(prefix_start, prefix_start + prefix_length)
    if causal and length > 1:
        before = [Block(rows, (prefix,), False, False)] if prefix_length else []
        return [*before, Block(rows, (rows,), True, bool(before))]
    if prefix_length and prefix.stop != start:
        return [Block(rows, (prefix, rows), False, False)]
    return [Block(rows, (slice(start - prefix_length, rows.stop),), False, False)]


def _rows(x: Tensor, runs: tuple[slice, ...]) -> Tensor:
    """Rows of a view by group; heads that repeat keys are not copied."""
    if len(runs) == 1:
        return x[:, :, runs[0]]
    return torch.cat([x[:, :1, run] for run in runs], dim=2).expand(-1, x.shape[1], -1, -1)


def _by_group(x: Tensor, kv_heads: int, group: int) -> Tensor:
    """[rows, heads or kv heads, d] -> view [kv heads, group, rows, d]; heads of a group that share keys repeat them."""
    rows, heads, d = x.shape
    return x.unflatten(1, (kv_heads, heads // kv_heads)).permute(1, 2, 0, 3).expand(kv_heads, group, rows, d)


class _BlockAttention(torch.autograd.Function):
    """Everything in one node of the graph, so that no gradient is padded to the whole sequence."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], short: ShortSamples | None
    ) -> Tensor:
        shape = k.shape[1], q.shape[1] // k.shape[1]
        out = q.new_empty(q.shape)
        logsumexp = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        queries, results, sums = (_by_group(x, *shape) for x in (q, out, logsumexp.unsqueeze(2)))
        keys, values = (_by_group(x, *shape) for x in (k, v))
        for rows, columns, causal, merges in blocks:
            part, part_sum = _forward(queries[:, :, rows], _rows(keys, columns), _rows(values, columns), 0.0, causal)
            result, total, part_sum = results[:, :, rows], sums[:, :, rows], part_sum.unsqueeze(3)
            if merges:
                part = torch.lerp(result.to(total.dtype), part.to(total.dtype), torch.sigmoid(part_sum - total))
                part_sum = torch.logaddexp(part_sum, total)
            result.copy_(part)
            total.copy_(part_sum)
        if short is not None:
            short.forward(q, k, v, out, logsumexp)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.blocks, ctx.short = blocks, short
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        shape = k.shape[1], q.shape[1] // k.shape[1]
        # keys collect from many queries: in bfloat16 the sum would lose them
        dk, dv = (logsumexp.new_zeros(x.shape) for x in (k, v))
        dq = logsumexp.new_empty(q.shape)
        grads, queries, results, query_grads = (_by_group(x, *shape) for x in (grad, q, out, dq))
        keys, values = (_by_group(x, *shape) for x in (k, v))
        sums = _by_group(logsumexp.unsqueeze(2), *shape).squeeze(3)
        for rows, columns, causal, merges in ctx.blocks:
            inputs = (grads[:, :, rows], queries[:, :, rows], _rows(keys, columns), _rows(values, columns))
            parts = _backward(*inputs, results[:, :, rows], sums[:, :, rows], 0.0, causal)
            query_grad = query_grads[:, :, rows]
            query_grad.add_(parts[0]) if merges else query_grad.copy_(parts[0])
            for total, part in ((dk, parts[1]), (dv, parts[2])):
                lengths = [run.stop - run.start for run in columns]
                for run, piece in zip(columns, part.split(lengths, dim=2), strict=True):
                    total[run].add_(piece.sum(1, dtype=total.dtype).transpose(0, 1))
        if ctx.short is not None:
            ctx.short.backward((grad, q, k, v, out, logsumexp), (dq, dk, dv))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None
