"""Which group the next sample comes from: seeded weighted draws, functions of their number and of what has ended."""

from bisect import bisect_right
from collections.abc import Collection

import numpy as np

from megabagel.data.faults import DataError
from megabagel.runtime import rng


class Mixture:
    """Draw number k gives a group index with probability weight / sum of the weights of the groups that go on."""

    def __init__(self, weights: dict[str, float], seed: int) -> None:
        """`weights`: group name -> weight, in group order. Raises DataError when they cannot be drawn from."""
        values = np.array(list(weights.values()), dtype=np.float64)
        if not len(values) or (values < 0).any() or not np.isfinite(values).all() or values.sum() <= 0:
            raise DataError(f"group weights {weights} cannot be drawn from; weights must be >= 0, at least one > 0.")
        self._weights = values
        self._thresholds: dict[frozenset[int], list[float]] = {}  # cumulative shares, once some groups have ended
        self._seed = seed

    def group(self, draw: int, ended: Collection[int] = ()) -> int | None:
        """Group index of draw number `draw`; None when all groups of a positive weight are in `ended`."""
        key = frozenset(ended)
        if key not in self._thresholds:
            self._thresholds[key] = self._cumulative(key)
        thresholds = self._thresholds[key]
        if not thresholds:
            return None
        value = float(rng.uniform(self._seed, "mixture", (0, draw)))
        return bisect_right(thresholds, value)

    def _cumulative(self, ended: frozenset[int]) -> list[float]:
        """Upper ends of the groups' shares of 0 .. 1 up to the last group that can be drawn; empty: there is none."""
        weights = self._weights.copy()
        weights[list(ended)] = 0
        if not weights.any():
            return []
        thresholds = (np.cumsum(weights) / weights.sum()).tolist()[: int(np.flatnonzero(weights)[-1]) + 1]
        return [*thresholds[:-1], 1.0]  # whatever rounding made of it
