"""Judges what the ranks of a layout report against what one process reports."""

import math

from tests.distributed.layouts.gradients import whole_norms
from tests.distributed.layouts.run import Trained

FP32, BF16 = 1e-5, 2e-2  # relative, of losses and gradient norms
ONE_GRADIENT = 1e-3  # relative, of the norm of one tensor's gradient after all updates
_FLOOR = 1e-5  # of the norm of all: gradients that are zero but for rounding


def wrong_values(ranks: list[Trained], reference: Trained, tolerance: float) -> dict[str, tuple[list, float | None]]:
    """Losses and gradient norms that differ: `"step, name" -> (what the ranks say, what the reference says)`.

    Ranks of other pipeline stages than the last know no losses; at least one rank must.
    """
    wrong = {}
    for step, expected in enumerate(reference.steps):
        for name in ("ce", "mse", "grad_norm"):
            wanted = getattr(expected, name)
            reported = [getattr(rank.steps[step], name) for rank in ranks]
            known = [value for value in reported if value is not None]
            if bool(known) != (wanted is not None) or not all(_is_close(v, wanted, tolerance) for v in known):
                wrong[f"step {step}, {name}"] = (reported, wanted)
    return wrong


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


def _is_close(value: float, wanted: float, tolerance: float) -> bool:
    return abs(value - wanted) <= tolerance * abs(wanted)  # never true of what is not a number
