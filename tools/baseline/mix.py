"""A realistic packed sequence without content: text-to-image, editing and multi-turn picture samples in turn."""

import random

import numpy as np

from megabagel.packing.geometry import Geometry, SpecialTokens
from megabagel.packing.plan import PackPlan
from megabagel.packing.planner import build_plan
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import PlannedSample, plan_sample

GEOMETRY = Geometry(
    latent_stride=16,
    max_latent_size=64,
    vit_patch_size=14,
    vit_max_num_patch_per_side=70,
    special_tokens=SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4),
)


def _text(draw: random.Random, least: int, most: int, loss: bool = False) -> Item:
    return Item("text", loss=loss, text_ids=[5] * draw.randint(least, most))


def _picture(draw: random.Random, kind: str, area: int, loss: bool = False) -> Item:
    """Of about `area` tokens, with sides in a ratio up to 3:2."""
    ratio = draw.choice([(1, 1), (4, 3), (3, 4), (3, 2), (2, 3)])
    rows, columns = (round((area * side / other) ** 0.5) for side, other in (ratio, ratio[::-1]))
    stride = GEOMETRY.stride(kind)
    # pixels are never read: one value stands for all
    return Item(kind, loss=loss, pixels=np.broadcast_to(np.uint8(0), (rows * stride, columns * stride, 3)))


def _sample(draw: random.Random, number: int, area: int) -> Sample:
    if number % 3 == 0:
        items = [_text(draw, 20, 120), _picture(draw, "vae_image", area, loss=True)]
    elif number % 3 == 1:
        source = [_picture(draw, "vae_image", area), _picture(draw, "vit_image", area // 2)]
        items = [*source, _text(draw, 10, 40), _picture(draw, "vae_image", area, loss=True)]
    else:
        turns = [_text(draw, 10, 60, loss=turn % 2 == 1) for turn in range(6)]
        items = [_picture(draw, "vit_image", area), *turns]
    return Sample(items, key=(0, number, 0), group="mix", origin=f"sample {number}")


def mixed_samples(tokens: int, seed: int = 0, area: int = 1024) -> list[PlannedSample]:
    """Samples of at most `tokens` tokens together, at least one; their pictures have about `area` tokens."""
    draw = random.Random(seed)
    samples, total = [], 0
    while True:
        sample = plan_sample(_sample(draw, len(samples), area), GEOMETRY, seed=seed)
        total += sample.num_tokens
        if samples and total > tokens:
            return samples
        samples.append(sample)


def mixed_plan(tokens: int, seed: int = 0, area: int = 1024) -> PackPlan:
    """The plan of `mixed_samples` in one pack, tiles of 16."""
    return build_plan(mixed_samples(tokens, seed, area), GEOMETRY, tile=16)
