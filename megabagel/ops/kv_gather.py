"""Queries, keys and values of both streams in attention order, normalised per head and rotated.

RMSNorm over each query and key head (Zhang and Sennrich 2019; as Qwen3 and BAGEL use it) and the rotate-half form of
rotary position embedding (Su et al. 2021).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from megabagel.ops import library


class HeadNorms(NamedTuple):
    """Weights [d] of the norms on query and key heads, of each stream; all None for a model without them."""

    und_q: Tensor | None
    und_k: Tensor | None
    gen_q: Tensor | None
    gen_k: Tensor | None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1) if x.dtype != torch.float64 else x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def kv_gather_reference(
    und: Tensor,
    gen: Tensor,
    norms: HeadNorms,
    cos: Tensor,
    sin: Tensor,
    order: Tensor,
    inverse: Tensor,
    heads_per_kv_head: int,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with PyTorch's functions."""
    queries, keys, values = [], [], []
    for mixed, q_weight, k_weight in ((und, *norms[:2]), (gen, *norms[2:])):
        mixed = mixed.unflatten(1, (-1, heads_per_kv_head + 2, head_dim))
        q, k, v = mixed.split([heads_per_kv_head, 1, 1], dim=2)
        queries.append(q if q_weight is None else rms_norm(q, (head_dim,), q_weight, eps))
        keys.append(k if k_weight is None else rms_norm(k, (head_dim,), k_weight, eps))
        values.append(v)
    q, k, v = (torch.cat(parts).flatten(1, 2).index_select(0, order) for parts in (queries, keys, values))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def kv_gather(
    und: Tensor,
    gen: Tensor,
    norms: HeadNorms,
    cos: Tensor,
    sin: Tensor,
    order: Tensor,
    inverse: Tensor,
    heads_per_kv_head: int,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> q [N, heads, d], k and v [N, kv heads, d], in the dtype of the streams.

    und, gen: [rows, kv heads * (heads_per_kv_head + 2) * d], of each kv head its query heads, the key and the value.
    cos, sin: float32 [N, d / 2], of the rows of the result. order: int64 [N], which row of both streams (und first)
    each row of the result is, every one at most once; inverse: int64 [und rows + gen rows], the way back, -1: nowhere.
    """
    arguments = cos, sin, order, inverse, heads_per_kv_head, head_dim, eps
    if not library.has_kernel("kv_gather", und):
        return kv_gather_reference(und, gen, norms, *arguments)
    return torch.ops.megabagel.kv_gather(und.contiguous(), gen.contiguous(), *norms, *arguments)


def _fake(und: Tensor, gen: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    cos, heads, d = rest[4], rest[8], rest[9]
    groups = und.shape[1] // ((heads + 2) * d)
    q = und.new_empty(cos.shape[0], groups * heads, d)
    return q, *(und.new_empty(cos.shape[0], groups, d) for _ in range(2))


def _fake_backward(dq: Tensor, dk: Tensor, dv: Tensor, und: Tensor, gen: Tensor, *rest) -> tuple[Tensor, ...]:
    return torch.empty_like(und), torch.empty_like(gen), und.new_empty(4, dq.shape[-1])


def _setup(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.heads_per_kv_head, ctx.head_dim, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    und, gen, norms = torch.ops.megabagel.kv_gather_backward(
        *(grad.contiguous() for grad in grads), *inputs, ctx.heads_per_kv_head, ctx.head_dim, ctx.eps
    )
    given = [None if weight is None else norms[i] for i, weight in enumerate(inputs[2:6])]
    return und, gen, *given, *([None] * 7)


if library.LOADED:
    torch.library.register_autograd("megabagel::kv_gather", _backward, setup_context=_setup)
    torch.library.register_fake("megabagel::kv_gather", _fake)
    torch.library.register_fake("megabagel::kv_gather_backward", _fake_backward)
