"""Which group the next sample comes from: seeded weighted draws, functions of their number and of what has ended."""

from collections.abc import Collection

import numpy as np

from megabagel.data.faults import DataError
from megabagel.runtime import rng


class Mixture:
    """Draw number k gives a group index with probability weight / sum of the weights of the groups that go on."""

    def __init__(self, weights: dict[str, float], seed: int) -> None:
        """`weights`: group name -> weight, in group order. Raises DataError when they cannot be drawn from."""
        self._weights = np.array(list(weights.values()), dtype=np.float64)
        values = self._weights
        if not len(values) or (values < 0).any() or not np.isfinite(values).all() or values.sum() <= 0:
            raise DataError(f"group weights {weights} cannot be drawn from; weights must be >= 0, at least one > 0.")
        self._seed = seed

    def group(self, draw: int, ended: Collection[int] = ()) -> int | None:
        """Group index of draw number `draw`; None when all groups of a positive weight are in `ended`."""
        weights = self._weights.copy()
        weights[list(ended)] = 0
        if not weights.any():
            return None
        value = float(rng.uniform(self._seed, "mixture", (0, draw)))
        index = int(np.searchsorted(np.cumsum(weights) / weights.sum(), value, side="right"))
        return min(index, int(np.flatnonzero(weights)[-1]))
