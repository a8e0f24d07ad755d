"""Which group the next sample comes from: seeded weighted draws, each a function of its number alone."""

import numpy as np

from megabagel.data.faults import DataError
from megabagel.runtime import rng


class Mixture:
    """Draw number k of data-parallel rank r gives a group index with probability weight / sum of weights."""

    def __init__(self, weights: dict[str, float], seed: int, data_parallel_rank: int) -> None:
        """`weights`: group name -> weight, in group order. Raises DataError when they cannot be drawn from."""
        values = np.array(list(weights.values()), dtype=np.float64)
        if not len(values) or (values < 0).any() or not np.isfinite(values).all() or values.sum() <= 0:
            raise DataError(f"group weights {weights} cannot be drawn from; weights must be >= 0, at least one > 0.")
        self._thresholds = np.cumsum(values) / values.sum()
        self._last = int(np.flatnonzero(values)[-1])
        self._seed, self._rank = seed, data_parallel_rank

    def group(self, draw: int) -> int:
        """Group index of draw number `draw`."""
        value = float(rng.uniform(self._seed, "mixture", (self._rank, draw)))
        return min(int(np.searchsorted(self._thresholds, value, side="right")), self._last)
