"""A realistic mix of samples: half text to image, a quarter edits, a quarter conversations about pictures.

Picture sizes follow BAGEL's resize rules, texts are random ids of plausible lengths. Pictures have no pixels in memory.
"""

import random

import numpy as np

from megabagel.config.datasets import ImageTransformArgs
from megabagel.data.images import target_size
from megabagel.packing.geometry import Geometry, SpecialTokens
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import PlannedSample, plan_sample

GEOMETRY = Geometry(16, 64, 14, 70, SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4))
ASPECTS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
VAE_RULE, EDIT_VIT_RULE = ImageTransformArgs(16, 1024, 512), ImageTransformArgs(14, 518, 224)
VLM_RULE = ImageTransformArgs(14, 980, 378, 2_007_040)
T2I, EDIT, VLM = range(3)


def draw_sample(draw: random.Random, number: int) -> tuple[int, PlannedSample]:
    """Group and sample."""
    group, aspect = draw.choices((T2I, EDIT, VLM), (2, 1, 1))[0], draw.choice(ASPECTS)
    long = draw.randint(512, 2048) if group != VLM else draw.randint(200, 1600)
    size = long * aspect[0] // max(aspect), long * aspect[1] // max(aspect)
    if group == T2I:
        items = [_text(draw, 20, 150), _picture("vae_image", size, VAE_RULE, loss=True)]
    elif group == EDIT:
        source = [_picture("vae_image", size, VAE_RULE), _picture("vit_image", size, EDIT_VIT_RULE)]
        items = [*source, _text(draw, 8, 40), _picture("vae_image", size, VAE_RULE, loss=True)]
    else:
        turns = [_text(draw, 8, 120, loss=bool(turn % 2)) for turn in range(2 * draw.randint(1, 8))]
        items = [_picture("vit_image", size, VLM_RULE), *turns]
    return group, _plan(items, number)


def draw_pack(seed: int, num_tokens: int) -> list[PlannedSample]:
    """Samples of exactly `num_tokens` tokens: the last one is a conversation without a picture that fills the rest."""
    draw, samples, left = random.Random(seed), [], num_tokens
    misses = 0
    while misses < 20:
        _, sample = draw_sample(draw, len(samples))
        if sample.num_tokens + 4 > left:
            misses += 1
            continue
        samples.append(sample)
        left -= sample.num_tokens
    lengths = [120] * (left // 122)
    rest = left - 122 * len(lengths)
    lengths += [rest - 2] if rest >= 2 else []
    if rest == 1:
        lengths[-1] += 1
    samples.append(_plan([_text(draw, n, n, loss=bool(turn % 2)) for turn, n in enumerate(lengths)], len(samples)))
    return samples


def _plan(items: list[Item], number: int) -> PlannedSample:
    return plan_sample(Sample(items, (0, number, 0), "mix", f"sample {number}"), GEOMETRY)


def _text(draw: random.Random, shortest: int, longest: int, loss: bool = False) -> Item:
    ids = [draw.randrange(10, 150_000) for _ in range(draw.randint(shortest, longest))]
    return Item("text", loss, text_ids=ids)


def _picture(kind: str, size: tuple[int, int], rule: ImageTransformArgs, loss: bool = False) -> Item:
    width, height = target_size(*size, rule)
    return Item(kind, loss, pixels=np.broadcast_to(np.uint8(0), (height, width, 3)))
