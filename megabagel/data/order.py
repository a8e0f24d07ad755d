"""The order in which rows of a group are visited: a seeded permutation per pass, computed, not stored.

Positions count on over passes without end. Who reads which position is not decided here.
"""

from bisect import bisect_right
from functools import lru_cache

import numpy as np

from megabagel.runtime import rng

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


def permute(index: int, size: int, keys: tuple[int, ...]) -> int:
    """Image of `index` under a pseudo-random permutation of 0 .. size-1: a Feistel network, walked until inside.

    `keys`: one 64-bit integer a round. Constant memory; at most four steps on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            mixed = ((right ^ key) * 0x9E3779B97F4A7C15) & _MASK64
            mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & _MASK64
            left, right = right, left ^ ((mixed ^ (mixed >> 32)) & mask)
        index = (left << half) | right
        if index < size:
            return index


def round_keys(seed: int, purpose: str, key: tuple[int, ...]) -> tuple[int, ...]:
    """Round keys for `permute`."""
    return tuple(int(k) for k in rng.integers(seed, purpose, key, 0, 2**62, _ROUNDS))


class GroupOrder:
    """Maps a position to (pass, row).

    Rows come in blocks that are cheap to read together (parquet row groups). Each pass puts the blocks in random order
    and shuffles the rows inside windows of `window` consecutive blocks: a reader needs only that many at a time.
    """

    def __init__(self, block_sizes: list[int], seed: int, group_index: int, window: int | None = None) -> None:
        """`window` null: one window over everything, a full shuffle."""
        self._arguments = (list(block_sizes), seed, group_index, window)
        self._sizes = np.asarray(block_sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._seed, self._group = seed, group_index
        self._window = window or max(1, len(block_sizes))
        self.num_rows = int(self._sizes.sum())
        self._layout = lru_cache(maxsize=4)(self._make_layout)
        self._keys = lru_cache(maxsize=64)(lambda visit, w: round_keys(seed, "row_order", (group_index, visit, w)))

    def __reduce__(self):
        return GroupOrder, self._arguments  # the caches stay here

    def row(self, position: int) -> tuple[int, int]:
        """Pass number and row at `position`."""
        visit, index = divmod(position, self.num_rows)
        window_starts, block_order, block_offsets = self._layout(visit)
        w = bisect_right(window_starts, index) - 1
        begin, end = window_starts[w], window_starts[w + 1]
        index = begin + permute(index - begin, end - begin, self._keys(visit, w))
        b = int(np.searchsorted(block_offsets, index, side="right")) - 1
        return visit, int(self._starts[block_order[b]] + index - block_offsets[b])

    def _make_layout(self, visit: int) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Window starts (with the end), block order and each block's offset in that order, for one pass."""
        order = rng.generator(self._seed, "block_order", (self._group, visit)).permutation(len(self._sizes))
        order = order[self._sizes[order] > 0]
        sizes = self._sizes[order]
        offsets = np.cumsum(sizes) - sizes
        return [*offsets[:: self._window].tolist(), self.num_rows], order, offsets
