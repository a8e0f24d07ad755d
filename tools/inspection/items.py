"""A pack taken apart again: samples and their items as the model gets them, read from the plan's tables alone.

Nothing here looks at the files: what the plan does not say is not shown.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from torch import Tensor

from megabagel.packing.plan import CAUSAL, NOISE, PackPlan

NOT_LEARNT = -1


@dataclass
class PackedItem:
    """A text or a picture with its frame tokens. `labels` [tokens]: what each position learns, NOT_LEARNT for none."""

    kind: str  # text, vit, vae (clean) or noised
    start: int  # position in the pack
    ids: np.ndarray  # int64 [tokens]; pictures: those of the two frame tokens only
    rope: tuple[int, int]  # RoPE id of the first and the last token
    labels: np.ndarray  # int64 [tokens]
    tokens: int
    grid: tuple[int, int] | None = None  # VAE pictures: rows and columns, in tokens
    timestep: float | None = None  # noised pictures: t between 0 (clean) and 1 (noise)
    learnt: bool = False  # a noised picture that carries the flow loss
    image: Tensor | None = None  # uint8 [3, H, W]
    new_split: bool = True  # False: a video frame that continues the split before


@dataclass
class PackedSample:
    """One sample of a pack."""

    group: str
    origin: str
    key: tuple[int, ...]
    items: list[PackedItem] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(item.tokens for item in self.items)


def unpack(pack, timestep_shift: float) -> list[PackedSample]:
    """The samples of a `Pack` in order. `timestep_shift`: of the model, applied to the timesteps that are shown."""
    plan = pack.plan
    ends = list(accumulate(plan.sample_lens.tolist()))
    named = zip(pack.groups, pack.origins, pack.keys, strict=True)
    samples = [PackedSample(group, origin, tuple(key)) for group, origin, key in named]
    number = 0
    for item in _items(plan, iter(pack.vit_images), iter(pack.vae_images), timestep_shift):
        while item.start >= ends[number]:
            number += 1
        samples[number].items.append(item)
    return samples


def _items(plan: PackPlan, vit_images: Iterator, vae_images: Iterator, shift: float) -> Iterator[PackedItem]:
    tables = _Tables(plan)
    vit_lengths, grids = iter(plan.vit_seqlens.tolist()), iter(plan.latent_grids.tolist())
    latents = 0  # VAE tokens so far
    split_start = 0
    for length, mode in zip(plan.split_lens.tolist(), plan.split_modes.tolist(), strict=True):
        at = split_start
        split_start += length
        if mode == CAUSAL:
            yield tables.item("text", at, length)
            continue
        while at < split_start:
            new_split = at == split_start - length
            if tables.is_latent[at + 1]:
                rows, columns = next(grids)
                item = tables.item("noised" if mode == NOISE else "vae", at, rows * columns + 2)
                raw = float(plan.timesteps[latents])
                latents += rows * columns
                item.grid, item.image, item.learnt = (rows, columns), next(vae_images), bool(tables.flow[at + 1])
                if mode == NOISE:
                    t = 1 / (1 + np.exp(-raw))
                    item.timestep = float(shift * t / (1 + (shift - 1) * t))
            else:
                item = tables.item("vit", at, next(vit_lengths) + 2)
                item.image = next(vit_images)
            item.new_split = new_split
            at += item.tokens
            yield item


class _Tables:
    """The plan's rows, turned into values at sequence positions."""

    def __init__(self, plan: PackPlan) -> None:
        length = plan.sequence_length
        und = plan.und_index.numpy()
        self.rope = plan.position_ids.numpy()
        self.ids = np.full(length, -1)
        self.ids[und[plan.text_rows.numpy()]] = plan.text_ids.numpy()
        self.labels = np.full(length, NOT_LEARNT)
        self.labels[und[plan.ce_rows.numpy()]] = plan.ce_labels.numpy()
        self.is_latent = np.zeros(length, dtype=bool)
        self.is_latent[plan.gen_index.numpy()] = True
        self.flow = np.zeros(length, dtype=bool)
        self.flow[plan.gen_index.numpy()[plan.mse_rows.numpy()]] = True

    def item(self, kind: str, start: int, tokens: int) -> PackedItem:
        inside = slice(start, start + tokens)
        ids = self.ids[inside]
        rope = int(self.rope[start]), int(self.rope[start + tokens - 1])
        return PackedItem(kind, start, ids[ids >= 0], rope, self.labels[inside], tokens)
