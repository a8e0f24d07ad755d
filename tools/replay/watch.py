"""Looks at what every module of a model gives and at the gradients of that; remembers what first is not finite."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Seen:
    """A tensor that a module gave, or the gradient of one."""

    module: str
    kind: str  # class of the module
    shape: tuple[int, ...]
    largest: float  # absolute value among the finite ones
    bad: int  # values that are not finite

    def __str__(self) -> str:
        what = f"{self.bad} not finite, the others" if self.bad else "finite,"
        return f"{self.module} ({self.kind}) {list(self.shape)}: {what} up to {self.largest:.4g}"


class Watch:
    """Hooks on all modules of `model`, for a `with` block. Inner modules come before those that hold them."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._handles = model, []
        self.outputs: list[Seen] = []  # in the order of the forward pass
        self.gradients: list[Seen] = []  # of the outputs, in the order of the backward pass

    def __enter__(self) -> "Watch":
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_hook(self._hook(name or "the whole model")))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable:
        def look(module: nn.Module, _, output: object) -> None:
            kind = type(module).__name__
            for tensor in _tensors(output):
                self.outputs.append(_look(name, kind, tensor))
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self.gradients.append(_look(name, kind, gradient)))

        return look


def first_bad(seen: list[Seen]) -> int | None:
    """Place of the first that is not finite."""
    return next((place for place, one in enumerate(seen) if one.bad), None)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


@torch.no_grad()
def _look(name: str, kind: str, tensor: Tensor) -> Seen:
    tensor = tensor.detach()
    finite = tensor.isfinite()
    largest = tensor[finite].abs().max().item() if finite.any() else 0.0
    return Seen(name, kind, tuple(tensor.shape), largest, int((~finite).sum()))
