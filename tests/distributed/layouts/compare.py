"""Judges what the ranks of a layout report against what one process reports."""

import math

from tests.distributed.layouts.gradients import whole_norms
from tests.distributed.layouts.run import Trained

FP32, BF16 = 1e-5, 2e-2  # relative, of losses and gradient norms
ONE_GRADIENT = 1e-3  # relative, of the norm of one tensor's gradient after all updates
_FLOOR = 1e-5  # of the norm of all: gradients that are zero but for rounding


def largest_difference(ranks: list[Trained], reference: Trained) -> float:
    """The largest relative difference of any loss or gradient norm of any step on any rank.

    Infinite where a number is not finite, where a rank lacks a number of the reference or has one too many. Ranks of
    other pipeline stages than the last know no losses; at least one rank must.
    """
    worst = 0.0
    for step, expected in enumerate(reference.steps):
        got = [rank.steps[step] for rank in ranks]
        worst = max(worst, *(_difference(values.grad_norm, expected.grad_norm) for values in got))
        for name in ("ce", "mse"):
            wanted = getattr(expected, name)
            reported = [value for values in got if (value := getattr(values, name)) is not None]
            if bool(reported) != (wanted is not None):
                return math.inf
            worst = max([worst, *(_difference(value, wanted) for value in reported)])
    return worst


def wrong_gradients(ranks: list[Trained], reference: Trained) -> dict[str, tuple[list[float], float]]:
    """Released tensors whose gradient's norm, in the last step, is not that of the reference on every rank."""
    got = whole_norms([rank.gradients for rank in ranks])
    wanted = {name: low for name, (low, _) in whole_norms([reference.gradients]).items()}
    floor = _FLOOR * math.hypot(*wanted.values())
    return {
        name: (got.get(name, []), wanted.get(name, math.nan))
        for name in got.keys() | wanted.keys()
        if name not in got
        or name not in wanted
        or not all(abs(norm - wanted[name]) <= ONE_GRADIENT * wanted[name] + floor for norm in got[name])
    }


def _difference(value: float, wanted: float) -> float:
    if value == wanted:
        return 0.0
    difference = abs(value - wanted) / max(abs(wanted), 1e-30)
    return difference if math.isfinite(difference) else math.inf
