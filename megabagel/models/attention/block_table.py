"""Which blocks of an attention mask are touched, from the table of problems alone, in time of the blocks touched.

Plain numpy; `flex.py` turns it into FlexAttention's BlockMask.
"""

from typing import NamedTuple

import numpy as np


class BlockLists(NamedTuple):
    """Per row of blocks, how many columns of blocks it lists, int32 [rows], and which, ascending, int32 [rows, columns]
    (filled up with 0)."""

    counts: np.ndarray
    columns: np.ndarray


def visible_ranges(problems: np.ndarray, length: int) -> np.ndarray:
    """int32 [4, length]: row i sees columns [0][i] .. [1][i] (the prefix) and [2][i] .. [3][i] (own rows).

    Rows in no problem see nothing.
    """
    ranges = np.zeros((4, length), np.int32)
    start, size, prefix_start, prefix_size, causal = problems[np.argsort(problems[:, 0])].T
    rows = size.sum()
    for into, values in zip(ranges, (prefix_start, prefix_start + prefix_size, start, start + size), strict=True):
        into[:rows] = np.repeat(values, size)
    ranges[3, :rows] = np.where(np.repeat(causal, size) == 1, np.arange(1, rows + 1), ranges[3, :rows])
    return ranges


def touched_blocks(problems: np.ndarray, blocks: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row of blocks [n], column of blocks [n], full bool [n]) of every visible pair, in order; `blocks` per side.

    A block is full where each of its rows sees each of its columns. The last row of blocks may be only partly in use.
    """
    start, size, prefix_start, prefix_size, causal = problems.T
    # pieces: what one row of blocks holds of one problem
    first, last = start // block, (start + size - 1) // block
    of = np.repeat(np.arange(len(problems)), last - first + 1)
    row = runs(first, last - first + 1)
    begin = np.maximum(start[of], row * block)
    end = np.minimum((start + size)[of], (row + 1) * block)
    some_end = np.where(causal[of] == 1, end, (start + size)[of])  # what some row of the piece sees
    all_end = np.where(causal[of] == 1, begin + 1, (start + size)[of])  # what all its rows see
    prefix_begin, prefix_end = prefix_start[of], (prefix_start + prefix_size)[of]
    joined = (prefix_end == start[of]) | (prefix_size[of] == 0)
    own_begin = np.where(joined & (prefix_size[of] > 0), prefix_begin, start[of])
    prefix_end = np.where(joined, prefix_begin, prefix_end)

    keys, rows_that_see_all = [], []
    for low, some, every in ((own_begin, some_end, all_end), (prefix_begin, prefix_end, prefix_end)):
        columns = np.where(some > low, -(-some // block) - low // block, 0)
        piece = np.repeat(np.arange(len(of)), columns)
        column = runs(low // block, columns)
        inside = (column * block >= low[piece]) & ((column + 1) * block <= every[piece])
        keys.append(row[piece] * blocks + column)
        rows_that_see_all.append(np.where(inside, (end - begin)[piece], 0))
    keys, back = np.unique(np.concatenate(keys), return_inverse=True)
    full = np.bincount(back, np.concatenate(rows_that_see_all), keys.size) == block
    return keys // blocks, keys % blocks, full


def block_lists(rows: np.ndarray, columns: np.ndarray, blocks: int) -> BlockLists:
    """The lists of (row, column) pairs, sorted by row, then column.

    FlexAttention reads the number of keys off their width, so they are square: 0.3 MB each for 36k tokens.
    """
    counts = np.bincount(rows, minlength=blocks)
    listed = np.zeros((blocks, blocks), np.int32)
    listed[rows, np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)] = columns
    return BlockLists(counts.astype(np.int32), listed)


def runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start .. start + length of every run, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
