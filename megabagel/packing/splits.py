"""A sample becomes splits: which items are kept, their token layout, attention modes, RoPE ids and timesteps.

One sample at a time and still without positions in a pack: `planner.py` puts several of these together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megabagel.packing.geometry import Geometry
from megabagel.packing.plan import CAUSAL, FULL, NOISE
from megabagel.packing.sample import Item, Sample
from megabagel.runtime import rng

TEXT, VIT, VAE = 0, 1, 2
_KINDS = {"text": TEXT, "vit_image": VIT, "vae_image": VAE}
CLEAN_TIMESTEP = float("-inf")  # sigmoid of it is the clean image's t = 0


@dataclass
class Piece:
    """One kept item: `start token, body, end token`. Video frames are pieces that share a split."""

    kind: int  # TEXT, VIT or VAE
    length: int  # tokens, start and end included
    rope_start: int  # RoPE id of the first token; a text counts on from here, an image keeps it
    starts_split: bool
    mode: int  # CAUSAL, FULL or NOISE, of the whole split
    loss: bool
    text_ids: np.ndarray | None  # text only: ids without start and end, int64
    grid: tuple[int, int] | None  # images only: rows and columns, in tokens
    timestep: float  # VAE only: before sigmoid and shift
    special_token_label: int | None  # label of the closing token, if it is a loss row
    image_key: tuple[int, ...] | None  # VAE only: seeds posterior and flow noise


@dataclass
class PlannedSample:
    """A sample after condition dropout. Pixel lists hold uint8 [H, W, 3] of the kept images in order, None as long as
    they are not read; the item lists say which items of the sample these images are."""

    pieces: list[Piece]
    key: tuple[int, ...]
    group: str
    origin: str
    vit_pixels: list[np.ndarray | None] = field(default_factory=list)
    vae_pixels: list[np.ndarray | None] = field(default_factory=list)
    vit_items: list[int] = field(default_factory=list)
    vae_items: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(piece.length for piece in self.pieces)


def draw_dropout(sample: Sample, probabilities: dict[str, float], seed: int) -> list[bool]:
    """Which items lose their content this visit: item i with `enable_cfg` is dropped with the probability of its type.

    Frames that share a split share one decision. The draw depends only on `seed` and the sample's key.
    """
    draws = rng.uniform(seed, "condition_dropout", sample.key, len(sample.items))
    dropped: list[bool] = []
    for i, item in enumerate(sample.items):
        continues = not item.split_start and i > 0
        dropped.append(dropped[-1] if continues else item.enable_cfg and float(draws[i]) < probabilities[item.type])
    return dropped


def plan_sample(
    sample: Sample,
    geometry: Geometry,
    dropped: Sequence[bool] | None = None,
    *,
    seed: int = 0,
    timesteps: Sequence[float] | None = None,
) -> PlannedSample:
    """Lay out `sample`.

    `dropped` [items] says which items are absent (none: nothing is dropped). `timesteps` gives the raw N(0, 1) value
    of each kept noised split in order; without it they are drawn from `seed` and the sample's key.
    Raises ValueError, naming the sample's origin, when an image does not fit the geometry or nothing is left.
    """
    dropped = [False] * len(sample.items) if dropped is None else list(dropped)
    given = iter(timesteps) if timesteps is not None else None
    planned = PlannedSample([], tuple(sample.key), sample.group, sample.origin)
    modes = _split_modes(sample.items)
    rope, timestep, open_split = 0, CLEAN_TIMESTEP, False
    for i, item in enumerate(sample.items):
        kind = _KINDS[item.type]
        open_split = open_split and not item.split_start
        if dropped[i]:  # its tokens are absent, but a dropped image still takes its RoPE id
            rope += kind != TEXT
            continue
        noised = kind == VAE and item.loss
        if noised and not open_split:
            drawn = next(given) if given is not None else rng.normal(seed, "timestep", (*sample.key, i))
            timestep = float(drawn)
        grid = None if kind == TEXT else _grid(item, geometry, sample.origin)
        body = len(item.text_ids) if grid is None else grid[0] * grid[1]
        piece = Piece(
            kind=kind,
            length=body + 2,
            rope_start=rope,
            starts_split=not open_split,
            mode=modes[i],
            loss=item.loss,
            text_ids=np.asarray(item.text_ids, dtype=np.int64) if kind == TEXT else None,
            grid=grid,
            timestep=timestep if noised else CLEAN_TIMESTEP,
            special_token_label=item.special_token_label,
            image_key=(*sample.key, i) if kind == VAE else None,
        )
        planned.pieces.append(piece)
        if kind == VIT:
            planned.vit_pixels.append(item.pixels)
            planned.vit_items.append(i)
        elif kind == VAE:
            planned.vae_pixels.append(item.pixels)
            planned.vae_items.append(i)
        rope += _rope_advance(item, kind, piece.length)
        open_split = not item.split_end
    if not planned.pieces:
        raise ValueError(f"{sample.origin}: no item is left after condition dropout; a sample must keep at least one")
    return planned


def _split_modes(items: Sequence[Item]) -> list[int]:
    """Mode of each item's split; one noised frame makes the split it is in a noised one."""
    modes: list[int] = []
    start = 0
    for i, item in enumerate(items):
        start = i if item.split_start else start
        mode = CAUSAL if item.type == "text" else NOISE if item.type == "vae_image" and item.loss else FULL
        modes.append(mode)
        if mode == NOISE:
            modes[start:] = [NOISE] * (i + 1 - start)
        elif i > start and modes[start] == NOISE:
            modes[i] = NOISE
    return modes


def _rope_advance(item: Item, kind: int, length: int) -> int:
    """RoPE ids used up by a kept item: a text one per token; an image one, or none where it carries the flow loss."""
    if kind == TEXT:
        return length
    if item.frame_delta is not None:
        return item.frame_delta
    return 0 if kind == VAE and item.loss else 1


def _grid(item: Item, geometry: Geometry, origin: str) -> tuple[int, int]:
    """Rows and columns of an image in tokens."""
    height, width = item.size if item.pixels is None else item.pixels.shape[:2]
    stride, side = geometry.stride(item.type), geometry.table_side(item.type)
    if height % stride or width % stride or not height or not width:
        raise ValueError(
            f"{origin}: {item.type} of {height}x{width} pixels (height x width), but both sides must be positive "
            f"multiples of {stride}; set image_stride of its group's transform to {stride}"
        )
    grid = height // stride, width // stride
    if max(grid) > side and not geometry.interpolate_pos:
        raise ValueError(
            f"{origin}: {item.type} of {height}x{width} pixels (height x width) makes {grid[0]}x{grid[1]} tokens, but "
            f"the position table has {side}x{side}; set max_image_size of its group's transform to {side * stride}"
        )
    return grid
