"""Every attention backend that runs here against float64 on the CPU, forward and backward, and its time at the size of
a training pack."""

from dataclasses import dataclass

import torch
from baseline.mix import mixed_plan
from torch import Tensor

from gpu.calls import forward_backward, in_float64
from gpu.report import Report
from gpu.timing import seconds_of
from megabagel.config.errors import ConfigError
from megabagel.models.attention import prepare_attention
from megabagel.packing.plan import PackPlan

# largest error of a row, relative to the root mean square of the rows' norms; a row with a wrong mask is off by about 1
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
BACKENDS = {"sdpa": tuple(TOLERANCE), "flex": tuple(TOLERANCE), "varlen": (torch.bfloat16,)}


@dataclass(frozen=True)
class Case:
    """A pack and the heads that attend over it."""

    name: str
    plan: PackPlan
    heads: int
    kv_heads: int
    head_dim: int

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        draw = torch.Generator(device).manual_seed(0)
        return tuple(
            torch.randn(self.plan.sequence_length, heads, self.head_dim, generator=draw, device=device)
            .to(dtype)
            .requires_grad_()
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )


def small_cases() -> list[Case]:
    return [
        Case("tiny pictures", mixed_plan(400, area=9), 8, 2, 64),
        Case("one sample", mixed_plan(1, area=100), 4, 4, 128),
        Case("many samples", mixed_plan(4000, seed=1, area=256), 7, 1, 128),
    ]


def _plan(case: Case, backend: str, dtype: torch.dtype, device: torch.device):
    return prepare_attention(case.plan.problems, case.plan.sequence_length, backend, device, dtype)


def row_error(found: Tensor, expected: Tensor) -> float:
    """Largest error of a row [heads, d], as `TOLERANCE` means it; infinite where it is no number."""
    errors = (found.double() - expected).flatten(1).norm(dim=1)
    size = expected.flatten(1).norm(dim=1).square().mean().sqrt()
    return float((errors / size).nan_to_num(nan=torch.inf).max())


def check(case: Case, backend: str, dtype: torch.dtype, device: torch.device, report: Report) -> None:
    """One row."""
    name = f"{backend} {str(dtype).removeprefix('torch.')} {case.name}"
    report.begin(name)
    arguments = case.tensors(dtype, device)
    attend = _plan(case, backend, dtype, device)
    found, again = (forward_backward(attend, arguments, 1) for _ in range(2))
    cpu = torch.device("cpu")
    exact = _plan(case, "sdpa", torch.float64, cpu)
    on_cpu = tuple(t.detach().cpu().requires_grad_() for t in arguments)
    on_host = {key: value.cpu() for key, value in found.items()}
    expected = forward_backward(exact, in_float64(on_cpu), 1, like=on_host)
    error = max(row_error(on_host[key], value) for key, value in expected.items())
    same = all(torch.equal(found[key], again[key]) for key in found)
    tolerance = TOLERANCE[dtype]
    report.row(name, error <= tolerance, error=float(f"{error:.2g}"), tolerance=tolerance, same_twice=same)


def time_backend(case: Case, backend: str, device: torch.device, report: Report) -> None:
    """Milliseconds of both directions in bfloat16, and the rate over visible pairs (backward counted twice)."""
    name = f"{backend} {case.name}"
    report.begin(name)
    q, k, v = case.tensors(torch.bfloat16, device)
    attend = _plan(case, backend, torch.bfloat16, device)
    grad = torch.ones_like(q)
    forward = seconds_of(lambda: attend(q, k, v), repeats=5, calls=3)
    both = seconds_of(lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), grad), repeats=5, calls=3)
    _, length, _, prefix, causal = case.plan.problems.unbind(1)
    pairs = int((length * (prefix + length) - causal * (length * (length - 1) // 2)).sum())
    rate = 3 * 4 * case.heads * case.head_dim * pairs / both / 1e12
    values = {"forward_ms": round(1e3 * forward, 2), "both_ms": round(1e3 * both, 2), "tflop_per_s": round(rate, 1)}
    report.row(name, None, **values)


def run(report: Report, device: torch.device) -> None:
    cases, large = small_cases(), Case("34k tokens of a 7B layer", mixed_plan(34_100), 28, 4, 128)
    for backend, dtypes in BACKENDS.items():
        try:
            _plan(cases[0], backend, dtypes[-1], device)
        except ConfigError as error:
            report.skip(str(error))
            continue
        for dtype in dtypes:
            for case in cases:
                check(case, backend, dtype, device, report)
        time_backend(large, backend, device, report)
