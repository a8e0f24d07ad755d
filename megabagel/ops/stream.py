"""Sequence order to padded streams and back: rows of one tensor in the order of another, cast on the way.

`order` [L] names the stream row of each sequence row, every row at most once; `inverse` [R] the sequence row of each
stream row, -1 for padding. Both directions are gathers, and each is the other's gradient.
"""

import torch
from torch import Tensor

from megabagel.ops import library


def stream_split_reference(x: Tensor, inverse: Tensor, order: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same with PyTorch's functions."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[inverse].to(dtype or x.dtype)


def stream_split(x: Tensor, inverse: Tensor, order: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[L, ...] -> [R, ...] in `dtype` (None: that of x): row r is x[inverse[r]], zeros for padding.

    Raises RuntimeError on the CPU where an index is out of range; CUDA takes such a row for padding.
    """
    if not library.has_kernel("stream_split", x):
        return stream_split_reference(x, inverse, order, dtype)
    return torch.ops.megabagel.stream_split(x, inverse, order, dtype or x.dtype)


def stream_merge_reference(x: Tensor, order: Tensor, inverse: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same with PyTorch's functions."""
    return x.index_select(0, order).to(dtype or x.dtype)


def stream_merge(x: Tensor, order: Tensor, inverse: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[R, ...] -> [L, ...] in `dtype` (None: that of x): row i is x[order[i]].

    Raises RuntimeError on the CPU where an index is out of range; CUDA gives zeros.
    """
    if not library.has_kernel("stream_merge", x):
        return stream_merge_reference(x, order, inverse, dtype)
    return torch.ops.megabagel.stream_merge(x, order, inverse, dtype or x.dtype)


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor, torch.dtype], output: Tensor) -> None:
    x, index, back, _ = inputs
    ctx.save_for_backward(back, index)
    ctx.dtype = x.dtype


def _split_backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.megabagel.stream_merge(grad, *ctx.saved_tensors, ctx.dtype), None, None, None


def _merge_backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.megabagel.stream_split(grad, *ctx.saved_tensors, ctx.dtype), None, None, None


def _fake(x: Tensor, index: Tensor, back: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(index.shape[0], *x.shape[1:], dtype=dtype)


if library.LOADED:
    for name, backward in (("stream_split", _split_backward), ("stream_merge", _merge_backward)):
        torch.library.register_autograd(f"megabagel::{name}", backward, setup_context=_setup_context)
        torch.library.register_fake(f"megabagel::{name}", _fake)
