"""Who sees whom in a pack, as a small picture: query rows from top to bottom, key columns from left to right.

Drawn from the attention problems that the kernels work on, so it shows what is computed and not what was meant.
"""

from dataclasses import dataclass

import numpy as np

from megabagel.packing.plan import CAUSAL, FULL, NOISE, PackPlan, Problem

COLOURS = {CAUSAL: (47, 111, 208), FULL: (23, 150, 110), NOISE: (214, 100, 32)}  # by the mode of the query's split


@dataclass(frozen=True)
class _Run:
    """Neighbours both in attention order and in the sequence. `row`: the first in attention order."""

    row: int
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


def coverage(plan: PackPlan, side: int) -> np.ndarray:
    """Share of visible pairs, float64 [3, side, side] in 0 .. 1: by mode of the query, query cell, key cell.

    `side` is cut to the sequence's length; at that size a cell is one token and the shares are the attention mask.
    """
    length = plan.sequence_length
    side = min(side, length)
    edges = np.linspace(0, length, side + 1)
    shares = np.zeros((3, side, side))
    order = plan.attention_index.numpy()
    for values in plan.problems.tolist():
        problem = Problem(*values)
        prefix = _runs(order, problem.prefix_start, problem.prefix_length)
        own = _runs(order, problem.start, problem.length)
        for query in _by_mode(own, plan):
            rows, first, last = _overlap(query.start, query.end, edges)
            mode = _mode_at(plan, query.start)
            for keys in prefix + _seen_fully(own, query, bool(problem.causal)):
                columns, left, right = _overlap(keys.start, keys.end, edges)
                shares[mode, first:last, left:right] += rows[:, None] * columns
            if problem.causal:
                shares[mode, first:last, first:last] += _triangle(query, edges[first : last + 1])
    cell = np.diff(edges)
    return shares / (cell[:, None] * cell)


def picture(plan: PackPlan, side: int) -> np.ndarray:
    """uint8 [side, side, 4], transparent where nothing is seen. Few visible pairs stay visible: shares are not linear
    in opacity."""
    shares = coverage(plan, side)
    total = shares.sum(axis=0)
    colours = np.array([COLOURS[mode] for mode in (CAUSAL, FULL, NOISE)], dtype=np.float64)
    mixed = np.einsum("mqk,mc->qkc", shares, colours) / np.maximum(total, 1e-12)[..., None]
    alpha = 255 * np.clip(total, 0, 1)[..., None] ** 0.6
    return np.concatenate([mixed, alpha], axis=-1).round().astype(np.uint8)


def _runs(order: np.ndarray, start: int, length: int) -> list[_Run]:
    """Rows start .. start + length of the attention order, cut where they are no neighbours in the sequence."""
    if not length:
        return []
    positions = order[start : start + length]
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    begins, ends = [0, *cuts.tolist()], [*cuts.tolist(), length]
    return [_Run(start + begin, int(positions[begin]), end - begin) for begin, end in zip(begins, ends, strict=True)]


def _by_mode(runs: list[_Run], plan: PackPlan) -> list[_Run]:
    """The same, cut where the split's mode changes."""
    ends = plan.split_lens.cumsum(0).numpy()
    modes = plan.split_modes.numpy()
    borders = ends[:-1][np.diff(modes) != 0]
    parts = []
    for run in runs:
        inside = borders[(borders > run.start) & (borders < run.end)].tolist()
        for begin, end in zip([run.start, *inside], [*inside, run.end], strict=True):
            parts.append(_Run(run.row + begin - run.start, begin, end - begin))
    return parts


def _mode_at(plan: PackPlan, position: int) -> int:
    ends = plan.split_lens.cumsum(0).numpy()
    return int(plan.split_modes[int(np.searchsorted(ends, position, side="right"))])


def _seen_fully(own: list[_Run], query: _Run, causal: bool) -> list[_Run]:
    """What of a problem's own rows all queries of the run see: all of them, or those before the run."""
    if not causal:
        return own
    before = [_Run(run.row, run.start, min(run.length, query.row - run.row)) for run in own]
    return [run for run in before if run.length > 0]


def _overlap(start: int, end: int, edges: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Length that start .. end has in each cell it touches, and the first and last + 1 of these cells."""
    first = int(np.searchsorted(edges, start, side="right")) - 1
    last = int(np.searchsorted(edges, end, side="left"))
    cells = np.clip(edges[first : last + 1], start, end)
    return np.diff(cells), first, last


def _triangle(query: _Run, edges: np.ndarray) -> np.ndarray:
    """Pairs (q, k <= q) of a run inside each cell. Tokens are cut at cell borders by their share."""
    tokens = np.arange(query.start, query.end)
    seen = np.clip(np.minimum(tokens[:, None] + 1, edges) - query.start, 0, None)  # keys before each border
    keys = np.diff(seen, axis=1)
    rows = np.diff(np.clip(edges, tokens[:, None], tokens[:, None] + 1), axis=1)  # share of a token in each cell
    return rows.T @ keys
