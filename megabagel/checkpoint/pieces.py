"""Rectangles of global tensors: what a rank writes to a checkpoint and where it puts what it reads from one.

The data of a piece is a view of the live tensor, so one list of pieces serves both. Which pieces a rank has is
decided elsewhere.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LIMIT = 64 * 2**20  # bytes of the largest piece: a reader must take a stored piece as a whole


@dataclass(frozen=True)
class Piece:
    """The rectangle of the tensor `key` of `global_shape` that begins at `offsets` and has the shape of `data`.

    `dtype` is its type in a checkpoint (None: that of `data`).
    """

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor
    dtype: torch.dtype | None = None

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.dtype or self.data.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in a checkpoint."""
        return self.data.numel() * self.stored_dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where a rank's part of the tensor `key` lies in it: from `offsets` on, `shape` elements along each dimension."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def whole(self, data: Tensor, dtype: torch.dtype | None = None) -> list[Piece]:
        """All of the part, as pieces of at most LIMIT bytes; `data` has its elements."""
        piece = Piece(self.key, self.global_shape, self.offsets, data.view(self.shape), dtype)
        return list(cut(piece)) if data.numel() else []

    def flat(self, data: Tensor, start: int, dtype: torch.dtype | None = None) -> list[Piece]:
        """Elements from `start` on of the flattened part, as pieces of at most LIMIT bytes; `data` is 1-D."""
        pieces, begin = [], 0
        for offsets, lengths in rectangles(self.shape, start, start + data.numel()):
            end = begin + math.prod(lengths)
            place = tuple(a + b for a, b in zip(self.offsets, offsets, strict=True))
            pieces += cut(Piece(self.key, self.global_shape, place, data[begin:end].view(lengths), dtype))
            begin = end
        return pieces


def rectangles(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, lengths) of the rectangles that the elements [start, end) of a flattened tensor consist of, in order.

    In two dimensions: the end of a row, whole rows, the beginning of a row.
    """
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # within one row
        yield from _in_row(shape, last, start, end)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if last * row < end:
        yield from _in_row(shape, last, last * row, end)


def _in_row(shape: Sequence[int], row: int, start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    before = row * math.prod(shape[1:])
    for offsets, lengths in rectangles(shape[1:], start - before, end - before):
        yield (row, *offsets), (1, *lengths)


def cut(piece: Piece) -> Iterator[Piece]:
    """The piece, in slices along its first dimensions where it has more than LIMIT bytes."""
    if piece.nbytes <= LIMIT:
        yield piece
        return
    dim = next(d for d, length in enumerate(piece.data.shape) if length > 1)
    length = piece.data.shape[dim]
    rows = max(1, LIMIT * length // piece.nbytes)
    for start in range(0, length, rows):
        offsets = list(piece.offsets)
        offsets[dim] += start
        data = piece.data.narrow(dim, start, min(rows, length - start))
        yield from cut(replace(piece, offsets=tuple(offsets), data=data))
