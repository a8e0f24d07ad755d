"""New rows of several contexts, one segment each, laid out as a PackPlan of rows without losses.

A segment is a run of tokens or one picture with its frame tokens. What was read before is not in the plan: the caches
hold it (`attention.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megabagel.packing.geometry import Geometry, grid_position_ids
from megabagel.packing.plan import CAUSAL, FULL, PackPlan
from megabagel.packing.splits import TEXT, VAE, VIT


@dataclass(frozen=True)
class Segment:
    """What one context gets in one pass."""

    kind: int  # TEXT, VIT or VAE
    ids: tuple[int, ...] = ()  # text only: the tokens as they are, frame tokens included where they are wanted
    grid: tuple[int, int] | None = None  # pictures only: rows and columns, in tokens

    @property
    def length(self) -> int:
        """Tokens, those that frame a picture included."""
        return len(self.ids) if self.grid is None else self.grid[0] * self.grid[1] + 2

    @property
    def rope_advance(self) -> int:
        """RoPE ids that it takes when it is kept."""
        return self.length if self.kind == TEXT else 1


def text(ids: Sequence[int]) -> Segment:
    """Tokens as they are."""
    return Segment(TEXT, ids=tuple(ids))


def picture(kind: int, grid: tuple[int, int]) -> Segment:
    """A picture of `kind` VIT or VAE between its frame tokens."""
    return Segment(kind, grid=tuple(grid))


def plan_rows(
    segments: Sequence[Segment], ropes: Sequence[int], geometry: Geometry, multiple: int, least: int = 0
) -> PackPlan:
    """The plan of `segments`, the RoPE ids of each from `ropes` on; attention order is the order of the segments.

    Streams are padded to a `multiple` of rows, and to `least`, one of those multiples. An empty one may stay empty: no
    gradients, so nobody waits for it.
    """
    kinds: list[int] = []
    positions: list[int] = []
    text_ids: list[int] = []
    tables: dict[int, list[Tensor]] = {VIT: [], VAE: []}
    special = geometry.special_tokens
    for segment, rope in zip(segments, ropes, strict=True):
        if segment.kind == TEXT:
            kinds += [TEXT] * segment.length
            positions += range(rope, rope + segment.length)
            text_ids += segment.ids
            continue
        kinds += [TEXT, *[segment.kind] * (segment.length - 2), TEXT]
        positions += [rope] * segment.length
        text_ids += special.start_of_image, special.end_of_image
        side = geometry.table_side("vit_image" if segment.kind == VIT else "vae_image")
        ids = grid_position_ids(*segment.grid, side, geometry.interpolate_pos)
        tables[segment.kind].append(torch.tensor(ids))
    kind, none = torch.tensor(kinds), torch.empty(0, dtype=torch.int64)
    und_index, gen_index = (kind != VAE).nonzero()[:, 0], (kind == VAE).nonzero()[:, 0]
    lengths = torch.tensor([segment.length for segment in segments])
    causal = torch.tensor([segment.kind == TEXT for segment in segments])
    zeros = torch.zeros_like(lengths)
    grids = {of: [segment.grid for segment in segments if segment.kind == of] for of in (VIT, VAE)}
    return PackPlan(
        und_length=max(least, -(-len(und_index) // multiple) * multiple),
        gen_length=max(least, -(-len(gen_index) // multiple) * multiple),
        und_index=und_index,
        gen_index=gen_index,
        position_ids=torch.tensor(positions),
        text_ids=torch.tensor(text_ids),
        text_rows=(kind[und_index] == TEXT).nonzero()[:, 0],
        vit_rows=(kind[und_index] == VIT).nonzero()[:, 0],
        vit_position_ids=torch.cat([none, *tables[VIT]]),
        vit_seqlens=torch.tensor([rows * columns for rows, columns in grids[VIT]], dtype=torch.int64),
        latent_position_ids=torch.cat([none, *tables[VAE]]),
        latent_grids=torch.tensor(grids[VAE], dtype=torch.int64).reshape(-1, 2),
        timesteps=torch.zeros(len(gen_index)),
        image_keys=none.reshape(-1, 1),
        ce_rows=none,
        ce_labels=none,
        ce_weights=none.float(),
        mse_rows=none,
        sample_lens=lengths,
        split_lens=lengths,
        split_modes=torch.where(causal, CAUSAL, FULL),
        attention_index=torch.arange(len(kind)),
        problems=torch.stack([lengths.cumsum(0) - lengths, lengths, zeros, zeros, causal.long()], dim=1),
    )
