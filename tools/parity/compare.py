"""How far measured values are from the expected ones: relative errors per group, each with its tolerance.

A value counts as wrong when either its tensor as a whole (relative L2) or any single entry deviates; an entry is judged
against its own size plus `floor` times the tensor's root mean square, which is what float32 rounding needs.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Group:
    """One line of the report."""

    tolerance: float
    floor: float = 1.0
    error: float = 0.0
    worst: str | None = None
    checked: int = 0

    def add(self, name: str, error: float) -> None:
        self.checked += 1
        if not error <= self.error:  # NaN counts as worse than anything
            self.error, self.worst = (error if math.isfinite(error) else 1e9), name


@dataclass
class Report:
    """Groups by name."""

    groups: dict[str, Group] = field(default_factory=dict)

    def group(self, name: str, tolerance: float, floor: float = 1.0) -> Group:
        return self.groups.setdefault(name, Group(tolerance, floor))

    @property
    def passed(self) -> bool:
        return all(group.error <= group.tolerance for group in self.groups.values())

    def as_json(self) -> dict:
        return {
            name: {"error": float(f"{g.error:.3g}"), "tolerance": g.tolerance, "worst": g.worst, "checked": g.checked}
            for name, g in self.groups.items()
        }


def compare(group: Group, name: str, found: Tensor | None, expected: Tensor, scale: Tensor | None = None) -> None:
    """Record the error of a tensor; `scale` (default: the expected tensor) is what errors are relative to."""
    if found is None or found.shape != expected.shape:
        group.add(f"{name} (found {'nothing' if found is None else list(found.shape)})", math.inf)
        return
    if not expected.numel():
        return
    difference = (found.double() - expected.double()).abs()
    size = (expected if scale is None else scale).double().abs()
    rms = size.square().mean().sqrt()
    if rms == 0:  # nothing to be relative to: the values must be the same
        group.add(name, difference.max().item())
        return
    whole = difference.square().mean().sqrt() / rms
    single = (difference / (size + group.floor * rms)).max()
    group.add(name, max(whole.item(), single.item()))


def compare_number(group: Group, name: str, found: float | None, expected: float, scale: float | None = None) -> None:
    """Record the error of a number relative to `scale` (default: the expected number)."""
    if found is None:
        group.add(f"{name} (found nothing)", 0.0 if expected == 0 else math.inf)
        return
    size = abs(expected if scale is None else scale)
    group.add(name, abs(found - expected) / size if size else abs(found - expected))


def assemble(parts: list[tuple[Tensor, Tensor]], length: int) -> Tensor | None:
    """Rows [n, ...] with their places [n] -> one tensor of `length` rows, NaN where no part has a row."""
    if not parts:
        return None
    rows = parts[0][1]
    out = torch.full((length, *rows.shape[1:]), torch.nan)
    for places, part in parts:
        out[places] = part.float()
    return out
