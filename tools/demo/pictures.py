"""The two scores of pictures: emojis from their names, and edits of emojis whose variants were never trained on.

Only what is asked, and who the candidates are; the nearest one is found in nearest.py.
"""

import io
import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from PIL import Image

from megabagel.inference import FlowSettings, Generator, Guidance
from tools.demo.nearest import hits, latents_of

PROMPTS, OTHERS = 64, 20
DRAWS = 4  # pictures of each edit, of other noise: one alone moves the score of 72 edits by up to eight points
# Nothing bounds the length of guided velocities, and guidance never pauses: the model is small and its pictures simple.
T2I_FLOW = FlowSettings(13, 1.0, Guidance(3.0, 1.0, (0.0, 1.0), renorm_min=1.0))
EDIT_FLOW = FlowSettings(13, 1.0, Guidance(3.0, 1.0, (0.0, 1.0), renorm_min=1.0))


@dataclass(frozen=True)
class EditRow:
    """One held-out edit; pictures as PNG bytes."""

    source: bytes
    target: bytes
    instruction: str


@dataclass(frozen=True)
class Made:
    """Pictures that were asked for, and whether each was recognised as what it should be."""

    prompts: list[str]
    images: list[Image.Image]
    wanted: list[Image.Image]
    right: list[bool]
    chances: list[float]  # of one who picks a candidate blindly
    sources: list[Image.Image] | None = None

    def scores(self, word: str = "") -> dict | None:
        """Of the prompts that have `word`: count, accuracy (share of the right ones) and chance; None if there are
        none."""
        chosen = [n for n, prompt in enumerate(self.prompts) if word in prompt]
        if not chosen:
            return None
        right, chance = (sum(of[n] for n in chosen) / len(chosen) for of in (self.right, self.chances))
        return {"count": len(chosen), "accuracy": right, "chance": chance}


def open_png(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _rows(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def text_to_image(bagel: Generator, data: Path) -> Made:
    """`PROMPTS` of the training prompts, evenly spread; candidates are all training pictures."""
    rows = _rows(data / "t2i")
    pictures = [open_png(row["image"]) for row in rows]
    chosen = [n * len(rows) // min(PROMPTS, len(rows)) for n in range(min(PROMPTS, len(rows)))]
    prompts = [json.loads(rows[n]["captions"])["name"] for n in chosen]
    images = [drawn.image for drawn in bagel.pictures(prompts, T2I_FLOW)]
    trained = latents_of(bagel.autoencoder, pictures)
    right = hits(latents_of(bagel.autoencoder, images), [trained] * len(chosen), chosen)
    return Made(prompts, images, [pictures[n] for n in chosen], right, [1 / len(rows)] * len(chosen))


def edits(bagel: Generator, data: Path) -> Made:
    """`DRAWS` pictures of each held-out edit, one after another; candidates are those of `candidates_of`."""
    once = [EditRow(*row["image_list"], row["instruction_list"][0][0]) for row in _rows(data / "edit_val")]
    rows = [row for row in once for _ in range(DRAWS)]
    names = [of_row for of_row in candidates_of(once) for _ in range(DRAWS)]
    every = sorted({name for of_row in names for name in of_row})
    latents = dict(zip(every, latents_of(bagel.autoencoder, [open_png(png) for png in every]), strict=True))
    sources = [open_png(row.source) for row in rows]
    asked = [[source, row.instruction] for source, row in zip(sources, rows, strict=True)]
    images = [drawn.image for drawn in bagel.pictures(asked, EDIT_FLOW)]
    candidates = [torch.stack([latents[name] for name in of_row]) for of_row in names]
    right = hits(latents_of(bagel.autoencoder, images), candidates, [0] * len(rows))
    wanted, chances = [open_png(row.target) for row in rows], [1 / len(of_row) for of_row in names]
    return Made([row.instruction for row in rows], images, wanted, right, chances, sources)


def candidates_of(rows: list[EditRow]) -> list[list[bytes]]:
    """Of each edit the pictures that its result could be taken for: the target first, the source, all other variants of
    the source, then `OTHERS` held-out pictures of something else, drawn with the edit's number as seed."""
    family = _families(rows)
    every = sorted(family)
    names = []
    for number, row in enumerate(rows):
        variants = [png for png in every if family[png] == family[row.source] and png not in (row.source, row.target)]
        others = [png for png in every if family[png] != family[row.source]]
        drawn = random.Random(number).sample(others, min(OTHERS, len(others)))
        names.append([row.target, row.source, *variants, *drawn])
    return names


def _families(rows: list[EditRow]) -> dict[bytes, int]:
    """Picture -> number of its family: pictures that edits lead from and to, over any number of edits."""
    neighbours: dict[bytes, set[bytes]] = defaultdict(set)
    for row in rows:
        neighbours[row.source].add(row.target)
        neighbours[row.target].add(row.source)
    family: dict[bytes, int] = {}
    for number, first in enumerate(sorted(neighbours)):
        waiting = [first]
        while waiting:
            png = waiting.pop()
            if png not in family:
                family[png] = number
                waiting += neighbours[png]
    return family
