"""The gated activation of the MLPs in one pass: silu(gate) * up (Shazeer 2020)."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from megabagel.ops import library


def swiglu_reference(x: Tensor) -> Tensor:
    """The same with PyTorch's functions."""
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 * width], gate first -> [..., width], the same dtype; computed in float32 for bfloat16."""
    if not library.has_kernel("swiglu", x):
        return swiglu_reference(x)
    out = torch.ops.megabagel.swiglu(x.reshape(-1, x.shape[-1]).contiguous())
    return out.view(*x.shape[:-1], out.shape[-1])


def _backward(ctx, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return torch.ops.megabagel.swiglu_backward(grad.contiguous(), x)


if library.LOADED:
    torch.library.register_autograd(
        "megabagel::swiglu", _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )
    torch.library.register_fake("megabagel::swiglu", lambda x: x.new_empty(x.shape[0], x.shape[1] // 2))
    torch.library.register_fake("megabagel::swiglu_backward", lambda grad, x: torch.empty_like(x))
