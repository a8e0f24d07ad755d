"""Bytes that each operator must move, over its time, beside a plain copy of a large tensor on the same GPU."""

import torch
from torch import Tensor

from gpu.calls import tensors_in
from gpu.draw import Draw
from gpu.op_table import OPS, Op
from gpu.report import Report, Skipped
from gpu.timing import seconds_of
from megabagel.ops import library

TARGET = 0.7
COPIED = 2**30  # bytes, many times what caches hold


def size(tensors: list[Tensor]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def traffic(op: Op, arguments: tuple, outputs: list[Tensor], gradients: list[Tensor]) -> tuple[int, int]:
    """Bytes that the forward and the backward pass must read and write at least."""
    inputs = tensors_in(arguments)
    floats = [t for t in inputs if t.is_floating_point()]
    indexes = size([t for t in inputs if not t.is_floating_point()])
    forward = size(outputs) + indexes + (size(outputs + floats[1:]) if op.gathers else size(floats))
    backward = size(outputs + gradients) + indexes + (size(floats) if op.reads_inputs_again else 0)
    return forward, backward


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of torch's copy."""
    source = torch.empty(COPIED // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / seconds_of(lambda: target.copy_(source))


def measure(op: Op, dtype: torch.dtype, device: torch.device, rate: float, report: Report) -> None:
    """A row for each direction."""
    arguments = op.arguments(Draw(0, *op.large, dtype, device, misaligned=False))
    wanted = [t for t in tensors_in(arguments) if t.requires_grad]
    outputs = tensors_in(op.call(*arguments))
    differentiable = [o for o in outputs if o.requires_grad]
    grads = [torch.ones_like(o) for o in differentiable]

    def forward() -> None:
        with torch.no_grad():
            (op.in_place or op.call)(*arguments)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(differentiable, wanted, grads, retain_graph=True)

    directions = {"forward": forward, **({"backward": backward} if differentiable else {})}
    gradients = list(backward()) if differentiable else []
    for (name, work), moved in zip(directions.items(), traffic(op, arguments, outputs, gradients), strict=False):
        seconds = seconds_of(work)
        values = {"microseconds": round(seconds * 1e6, 1), "mb": round(moved / 1e6, 1)}
        row = f"{op.name} {name} {str(dtype).removeprefix('torch.')}"
        report.measured(row, moved / seconds / rate, TARGET, **values)


def run(report: Report, device: torch.device) -> None:
    if not library.LOADED:
        raise Skipped("the operators are not compiled.")
    report.begin("copy")
    rate = copy_rate(device)
    report.row("copy", None, gb_per_second=round(rate / 1e9, 1))
    for op in OPS:
        if not library.has_kernel(op.name, torch.empty(0, device=device)):
            report.skip(f"{op.name} is not compiled for {device.type}.")
            continue
        for dtype in (torch.bfloat16, torch.float32):
            report.begin(f"{op.name} {dtype}")
            measure(op, dtype, device, rate, report)
            torch.cuda.empty_cache()
