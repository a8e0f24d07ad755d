"""Attention on the CPU for short samples: each sample a small masked square, many samples in one call of the kernel.

Made for packs of hundreds of short texts and pictures, where a call for each problem takes longer than its arithmetic.
Long samples are `sdpa.py`'s own blocks.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
LONGEST = 256  # rows of a sample: above it, computing what a mask hides costs more than the calls that it saves
_STEP = 16  # samples are padded to a multiple of it, so that many are equally long


@dataclass
class Squares:
    """Samples of one padded length. `rows` [samples, length] in attention order, padding repeats a row; `place` is
    where they begin among the rows of all squares."""

    place: int
    shape: tuple[int, int]
    mask: Tensor | None  # float32 [samples, 1, length, length], 0 or -inf; None where everything is visible


class ShortSamples:
    """`problems` [P, 5] (see `packing.plan.Problem`) of short samples; the other rows are not touched.

    A sample is the problems whose keys begin at one row; `split_samples` says which are short.
    """

    def __init__(self, samples: list[np.ndarray]):
        by_length: dict[int, list[np.ndarray]] = defaultdict(list)
        for problems in samples:
            by_length[-(-int(problems[:, 1].sum()) // _STEP) * _STEP].append(problems)
        self.squares: list[Squares] = []
        rows, own, place = [], [], 0
        for length, group in sorted(by_length.items()):
            masks = np.zeros((len(group), 1, length, length), dtype=bool)
            for sample, problems in enumerate(group):
                members = _rows(problems)
                own.append(place + sample * length + np.arange(len(members)))
                rows.append(np.pad(members, (0, length - len(members)), mode="edge"))
                _hide(masks[sample, 0], problems)
            mask = torch.zeros(masks.shape).masked_fill_(torch.from_numpy(masks), -torch.inf) if masks.any() else None
            self.squares.append(Squares(place, (len(group), length), mask))
            place += len(group) * length
        self._padded = torch.from_numpy(np.concatenate(rows))  # row of each place
        self._places = torch.from_numpy(np.concatenate(own))
        self._rows = self._padded[self._places]  # each once

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor) -> None:
        """q, k and v as in `BlockPlan`; fills `out` [L, heads, d] and `logsumexp` [L, heads] in the samples' rows."""
        q, k, v = (x.index_select(0, self._padded) for x in (q, k, v))
        results, sums = torch.empty_like(q), logsumexp.new_empty(q.shape[:2])
        for squares in self.squares:
            for head, group in _heads(q, k):
                queries, keys, values = (self._cut(x, squares, part) for x, part in ((q, group), (k, head), (v, head)))
                mask = None if squares.mask is None else squares.mask.to(q.dtype)
                keys, values = (x.expand_as(queries) for x in (keys, values))
                part, part_sums = _forward(queries, keys, values, 0.0, False, attn_mask=mask)
                self._cut(results, squares, group).copy_(part)
                self._cut(sums.unsqueeze(2), squares, group).squeeze(3).copy_(part_sums)
        out.index_copy_(0, self._rows, results.index_select(0, self._places))
        logsumexp.index_copy_(0, self._rows, sums.index_select(0, self._places))

    def backward(
        self,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """`inputs`: the gradient of the result, q, k, v, the result, its log-sum-exp. Fills `grads`, those of q, k and
        v, in the samples' rows."""
        grad, q, k, v, out, sums = (x.index_select(0, self._padded) for x in inputs)
        real = torch.zeros(len(grad), 1, 1, dtype=grad.dtype)
        real[self._places] = 1
        grad *= real  # what padding queries are told is nothing: they add nothing to their keys
        parts = [x.new_empty(y.shape) for x, y in zip(grads, (q, k, v), strict=True)]
        for squares in self.squares:
            for head, group in _heads(q, k):
                mask = None if squares.mask is None else squares.mask.to(q.dtype)
                of_queries = [self._cut(x, squares, group) for x in (grad, q, out)]
                keys, values = (self._cut(x, squares, head).expand_as(of_queries[0]) for x in (k, v))
                total = self._cut(sums.unsqueeze(2), squares, group).squeeze(3)
                found = _backward(*of_queries[:2], keys, values, of_queries[2], total, 0.0, False, attn_mask=mask)
                self._cut(parts[0], squares, group).copy_(found[0])
                for place in (1, 2):
                    summed = found[place].sum(1, keepdim=True, dtype=parts[place].dtype)
                    self._cut(parts[place], squares, head).copy_(summed)
        for total, part in zip(grads, parts, strict=True):
            total.index_copy_(0, self._rows, part.index_select(0, self._places))

    def _cut(self, x: Tensor, squares: Squares, heads: slice) -> Tensor:
        """[places, all heads, d] -> view [samples, heads, length, d]."""
        samples, length = squares.shape
        stop = squares.place + samples * length
        return x[squares.place : stop, heads].unflatten(0, squares.shape).transpose(1, 2)


def split_samples(problems: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The short samples, each with its problems in order, and the problems of all others."""
    problems = problems[np.lexsort((problems[:, 0], problems[:, 2]))]
    edges = np.flatnonzero(np.diff(problems[:, 2])) + 1
    short, others = [], []
    for sample in np.split(problems, edges) if len(problems) else []:
        (short if _is_short(sample) else others).append(sample)
    return short, np.concatenate([problems[:0], *others])


def _is_short(problems: np.ndarray) -> bool:
    """Also that what its problems see are rows of its own."""
    if problems[:, 1].sum() > LONGEST:
        return False
    first, seen = problems[0, 2], int(problems[:, 3].max())
    return np.array_equal(_rows(problems)[:seen], first + np.arange(seen))


def _rows(problems: np.ndarray) -> np.ndarray:
    """Rows of the queries, ascending."""
    return np.concatenate([np.arange(start, start + length) for start, length in problems[:, :2].tolist()])


def _hide(mask: np.ndarray, problems: np.ndarray) -> None:
    """Set what the queries of a sample do not see in `mask` [length, length]; padding queries see everything."""
    count = int(problems[:, 1].sum())
    mask[:count] = True
    place = 0
    for _, length, _, prefix, causal in problems.tolist():
        stop = place + length
        mask[place:stop, :prefix] = False
        mask[place:stop, place:stop] = ~np.tri(length, dtype=bool) if causal else False
        place = stop


def _heads(q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """Each key head, and the query heads that use it."""
    group = q.shape[1] // k.shape[1]
    return [(slice(n, n + 1), slice(n * group, (n + 1) * group)) for n in range(k.shape[1])]
