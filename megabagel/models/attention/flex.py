"""Attention by FlexAttention over the blocks that the problems touch, compiled for a GPU.

The mask of a block comes from per-token ranges; no mask of the whole sequence exists at any time. Not for the CPU,
where FlexAttention has no backward pass.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from megabagel.models.attention.block_table import BlockLists, block_lists, touched_blocks, visible_ranges

BLOCK = 128


class FlexPlan:
    """Problems [P, 5] (see `packing.plan.Problem`) over `length` positions, padded so that few lengths occur.

    Two lengths are compiled: the first as it is, the second for any length. `attend` is FlexAttention, `compiled()` in
    training.
    """

    def __init__(self, problems: np.ndarray, length: int, device: torch.device, attend: Callable[..., Tensor]):
        self.length, self.attend = length, attend
        self.padded = padded_length(length)
        self.block_mask = block_mask(problems, self.padded, device) if length else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [L, heads, d], k and v [L, kv heads, d] -> [L, heads, d]; compiled, d >= 16."""
        if not self.length:
            return q + 0
        extra = self.padded - self.length
        inputs = (pad(x, (0, 0, 0, 0, 0, extra)).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = self.attend(*inputs, block_mask=self.block_mask, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)[: self.length]


def padded_length(length: int) -> int:
    """The least of a few lengths that holds `length`: whole blocks, eight sizes from each power of two to the next."""
    step = max(BLOCK, 1 << max(length.bit_length() - 4, 0))
    return -(-length // step) * step


def block_mask(problems: np.ndarray, length: int, device: torch.device, block: int = BLOCK) -> BlockMask:
    """The BlockMask over `length` positions, a multiple of `block`; positions in no problem see nothing."""
    blocks = length // block
    rows, columns, full = touched_blocks(problems, blocks, block)
    by_column = np.lexsort((rows, columns))
    fields = {}
    for prefix, chosen in (("", ~full), ("full_", full)):
        across = by_column[chosen[by_column]]
        for name, lists in (
            ("kv", block_lists(rows[chosen], columns[chosen], blocks)),
            ("q", block_lists(columns[across], rows[across], blocks)),
        ):
            fields |= _fields(prefix + name, lists, device)
    ranges = torch.from_numpy(visible_ranges(problems, length)).to(device)
    return BlockMask((length, length), **fields, BLOCK_SIZE=(block, block), mask_mod=_mask(*ranges.unbind()))


def _fields(name: str, lists: BlockLists, device: torch.device) -> dict[str, Tensor]:
    tensors = (torch.from_numpy(array)[None, None].to(device) for array in lists)
    return dict(zip((f"{name}_num_blocks", f"{name}_indices"), tensors, strict=True))


def _mask(prefix_start: Tensor, prefix_end: Tensor, start: Tensor, end: Tensor) -> Callable[..., Tensor]:
    """Whether a query sees a key, from the ranges of each query, int32 [length]."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prefix = (key >= prefix_start[query]) & (key < prefix_end[query])
        return in_prefix | ((key >= start[query]) & (key < end[query]))

    return visible


@lru_cache
def compiled() -> Callable[..., Tensor]:
    """FlexAttention, compiled at its first call. Outside of one whole graph it would fall back to scores of the
    whole sequence: better an error."""
    return torch.compile(flex_attention, fullgraph=True)
