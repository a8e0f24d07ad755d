"""Runs one call of an operator forward and backward; looks through tuples for its tensors. It compares nothing."""

from collections.abc import Callable

import torch
from torch import Tensor


def tensors_in(value: object) -> list[Tensor]:
    """The tensors of a result or of arguments, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_in(part)]
    return []


def _mapped(value: object, change: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def in_float64(arguments: tuple) -> tuple:
    """Copies of the arguments, floats as float64."""
    return _mapped(
        arguments,
        lambda t: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t,
    )


def _gradients_for(outputs: list[Tensor], like: list[Tensor], seed: int) -> list[Tensor]:
    """N(0, 1), rounded to the types of `like`, in the shapes and types of the outputs."""
    draw = torch.Generator(outputs[0].device).manual_seed(seed)
    values = [torch.randn(o.shape, generator=draw, device=o.device) for o in outputs]
    return [v.to(t.dtype).to(o.dtype) for v, t, o in zip(values, like, outputs, strict=True)]


def forward_backward(
    function: Callable, arguments: tuple, seed: int, like: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs by "out N" and gradients of the arguments that want one by "grad N".

    `like`: an earlier result; the gradients of the outputs are the same numbers as there.
    """
    outputs = tensors_in(function(*arguments))
    results = {f"out {i}": o.detach() for i, o in enumerate(outputs)}
    wanted = [t for t in tensors_in(arguments) if t.requires_grad]
    differentiable = {name: o for name, o in zip(results, outputs, strict=True) if o.requires_grad}
    if wanted and differentiable:
        models = [(like or results)[name] for name in differentiable]
        outputs = list(differentiable.values())
        found = torch.autograd.grad(outputs, wanted, _gradients_for(outputs, models, seed), allow_unused=True)
        results.update({f"grad {i}": g for i, g in enumerate(found) if g is not None})
    return results
