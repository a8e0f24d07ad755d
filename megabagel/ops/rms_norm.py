"""RMSNorm in one pass: x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""

import torch
from torch import Tensor

from megabagel.ops import library


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same with PyTorch's function."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., h] and weight [h], one dtype -> [..., h]; computed in float32 for bfloat16. Gradients for both.

    The gradient of the weight does not depend on the number of threads.
    """
    if not library.has_kernel("rms_norm", x):
        return rms_norm_reference(x, weight, eps)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return torch.ops.megabagel.rms_norm(rows, weight, eps)[0].view(x.shape)


def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=wide)


def _setup(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None]:
    x, weight, rstd = ctx.saved_tensors
    return *torch.ops.megabagel.rms_norm_backward(grad.contiguous(), x, weight, rstd), None


if library.LOADED:
    torch.library.register_autograd("megabagel::rms_norm", _backward, setup_context=_setup)
    torch.library.register_fake("megabagel::rms_norm", _fake)
    torch.library.register_fake(
        "megabagel::rms_norm_backward",
        lambda grad, x, weight, rstd: (torch.empty_like(x), torch.empty_like(weight)),
    )
