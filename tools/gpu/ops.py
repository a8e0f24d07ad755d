"""Every operator against its reference in float64: forward and backward, odd shapes, poisoned memory, twice the same.

`torch.empty` gives NaN while this runs, so that a value that a kernel forgets is seen.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from parity.compare import Group, compare

from gpu.calls import forward_backward, in_float64
from gpu.draw import Draw
from gpu.op_table import OPS, Op
from gpu.report import Report, Skipped
from megabagel.ops import library

ROWS = (0, 1, 2, 17, 130, 1003)
WIDTHS = (1, 3, 8, 40, 129, 256)
# largest relative error against float64: of single values beside their own size plus the tensor's root mean square
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors without content hold NaN, on the CPU and on CUDA. Raises RuntimeError when they do not."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        if not torch.empty(8).isnan().all():
            raise RuntimeError("this torch does not fill new memory, so forgotten values would not be seen")
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def check_call(op: Op, draw: Draw, seed: int, group: Group) -> list[str]:
    """Compare one call with the reference, errors into `group`; returns what else is wrong, in words."""
    arguments = op.arguments(draw)
    found = forward_backward(op.call, arguments, seed)
    again = forward_backward(op.call, arguments, seed)
    expected = forward_backward(op.reference, in_float64(arguments), seed, like=found)
    wrong = [] if found.keys() == expected.keys() else [f"gives {sorted(found)}, the reference {sorted(expected)}"]
    for name in found.keys() & expected.keys():
        compare(group, name, found[name], expected[name])
        if not torch.equal(found[name], again[name]):
            wrong.append(f"{name} is not the same twice")
    if not draw.guards_are_whole():
        wrong.append("writes outside of its arguments")
    return wrong


def check_op(op: Op, dtype: torch.dtype, device: torch.device, report: Report) -> None:
    """All shapes, every one aligned and not; one row of the report."""
    name = f"{op.name} {device.type} {str(dtype).removeprefix('torch.')}"
    report.begin(name)
    probe = torch.empty(0, device=device)
    if not library.has_kernel(op.name, probe):
        report.skip(f"{op.name} is not compiled for {device.type}.")
        return
    group, wrong, calls = Group(TOLERANCE[dtype]), set(), 0
    for seed, (rows, width, misaligned) in enumerate(itertools.product(ROWS, WIDTHS, (False, True))):
        shape = f"{rows} x {width}{' misaligned' if misaligned else ''}"
        worst = group.error
        draw = Draw(seed, rows, width, dtype, device, misaligned)
        wrong |= {f"{what} ({shape})" for what in check_call(op, draw, seed, group)}
        if group.error > worst:
            group.worst = f"{group.worst} ({shape})"
        calls += 1
    passed = group.error <= group.tolerance and not wrong
    values = {"calls": calls, "error": float(f"{group.error:.2g}"), "tolerance": group.tolerance, "worst": group.worst}
    report.row(name, passed, **values, **({"wrong": sorted(wrong)[:5]} if wrong else {}))


def run(report: Report, device: torch.device) -> None:
    if not library.LOADED:
        raise Skipped("the operators are not compiled; 'python csrc/build.py' says why.")
    with poisoned_memory():
        for op in OPS:
            for dtype in TOLERANCE:
                check_op(op, dtype, device, report)
