"""The packs that every layout trains on: hand-made samples of every kind, the same whoever reads them.

Stands in for the data reader; content is drawn by (step, pack, item), so no layout changes it.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megabagel.data.pack import Pack
from megabagel.packing.geometry import Geometry, SpecialTokens
from megabagel.packing.planner import build_plan
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import plan_sample
from megabagel.runtime import rng

SPECIAL = SpecialTokens(bos=250, eos=251, start_of_image=252, end_of_image=253)
SEED = 11

# What a pack holds: samples of items. A word is an item: kind, then its number of tokens (texts) or rows x columns of
# tokens (images); `+` carries a loss, `~` a frame that shares its split with the next one, `!` a closing-token loss.
KINDS: dict[str, tuple[str, ...]] = {
    "no image": ("text5+", "text3 text9+"),
    "gen loss only": ("text7 vae2x2+",),
    "und only": ("vit2x3 text4 text6+ text2 text3+",),
    "three images": ("vae2x2 vit3x2 text5 vae1x2+ vae1x2 vit2x2 text4 vae2x2+",),
    "one long sample": ("text30 vit4x5 text40+ vae3x3+ vae3x3 vit4x4 text17+",),
    "mixed": ("text6 vae2x2+", "vit3x3 text3 text5+", "text8+"),
    "frames": ("text4 vae1x2~ vae1x2+", "vit1x2 text3+! vae1x2! text2+"),
    "many samples": ("vit1x1 text1+", "text1 vae1x2+", "text2+", "vit2x1 text2 text2+", "text3 vae2x2+"),
    "no loss": ("text6 vit2x2 vae1x2",),
    "no image, no loss": ("text5",),
}
STEPS = (tuple(KINDS)[:8],) * 5  # of the table


def _item(word: str, key: tuple[int, ...], geometry: Geometry) -> Item:
    kind = next(k for k in ("text", "vit", "vae") if word.startswith(k))
    size = word.removeprefix(kind).rstrip("+~!")
    marks = {
        "loss": "+" in word,
        "special_token_label": SPECIAL.eos if "!" in word else None,
        "split_end": "~" not in word,
    }
    if kind == "text":
        return Item("text", text_ids=rng.integers(SEED, "text", key, 0, 250, int(size)).tolist(), **marks)
    kind = f"{kind}_image"
    height, width = (int(side) * geometry.stride(kind) for side in size.split("x"))
    return Item(kind, pixels=rng.integers(SEED, kind, key, 0, 256, (height, width, 3)).astype(np.uint8), **marks)


def _sample(words: str, key: tuple[int, ...], geometry: Geometry) -> Sample:
    items = [_item(word, (*key, place), geometry) for place, word in enumerate(words.split())]
    for before, item in zip(items, items[1:], strict=False):
        item.split_start = before.split_end
    return Sample(items, key, "layouts", "tests/distributed/layouts/packs.py")


def make_pack(kind: str, key: tuple[int, int], geometry: Geometry, tile: int, total_length: int | None) -> Pack:
    """The pack of this kind at (step, place in the step)."""
    samples = [_sample(words, (*key, number), geometry) for number, words in enumerate(KINDS[kind])]
    planned = [plan_sample(sample, geometry, seed=SEED) for sample in samples]
    pixels = [torch.from_numpy(p).permute(2, 0, 1).contiguous() for s in planned for p in s.vae_pixels]
    seen = [torch.from_numpy(p).permute(2, 0, 1).contiguous() for s in planned for p in s.vit_pixels]
    plan = build_plan(planned, geometry, tile, total_length)
    return Pack(plan, pixels, seen, [s.group for s in samples], [s.key for s in samples], [s.origin for s in samples])


class PackReader:
    """Packs of one replica: of each step's kinds, every `replicas`-th from the `replica`-th on.

    `steps` lists the kinds of every step.
    """

    def __init__(
        self,
        steps: Sequence[Sequence[str]],
        replica: int,
        replicas: int,
        geometry: Geometry,
        tile: int,
        total_length: int | None,
    ):
        self._replica, self._replicas = replica, replicas
        self._steps, self._shape = steps, (geometry, tile, total_length)
        self._read = 0

    def next_step(self) -> list[Pack]:
        step = self._read
        self._read += 1
        places = range(len(self._steps[step]))[self._replica :: self._replicas]
        return [make_pack(self._steps[step][place], (step, place), *self._shape) for place in places]

    def state_dict(self) -> dict:
        return {"groups": ["layouts"], "faults": {"num_good": {}, "num_bad": {}}, "steps": self._read}

    def load_state_dict(self, state: dict) -> None:
        self._read = state["steps"]

    def close(self) -> None: ...
