"""One packed sequence as it leaves the reader: its plan and its pictures. How it comes about is not here."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megabagel.packing.geometry import Geometry
from megabagel.packing.plan import PackPlan
from megabagel.packing.planner import build_plan
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import PlannedSample, plan_sample

BFLOAT16_BITS = torch.int16  # numpy has no bfloat16: its bits travel as integers
BLANK = "blank"  # group of the text without loss that stands in a pack without samples


@dataclass
class Pack:
    """One packed sequence: the plan and its pictures. Per sample: group name, key and origin (file and row).

    A picture is uint8 [3, H, W], or floating point where it was encoded before: see `stored.py`. On ranks that did not
    read it, it is on the meta device: a shape without content.
    """

    plan: PackPlan
    vae_images: list[Tensor]  # in the order of plan.latent_grids
    vit_images: list[Tensor]  # in the order of plan.vit_seqlens
    groups: list[str]
    keys: list[tuple[int, ...]]
    origins: list[str]


def make_pack(samples: Sequence[PlannedSample], geometry: Geometry, tile: int, total_length: int | None = None) -> Pack:
    """The samples in the given order, pixels read; a blank text when there are none. `tile` and `total_length`: see
    `planner.build_plan`."""
    samples = list(samples) or [_blank(geometry)]
    return Pack(
        plan=build_plan(samples, geometry, tile, total_length),
        vae_images=[_tensor(pixels) for sample in samples for pixels in sample.vae_pixels],
        vit_images=[_tensor(pixels) for sample in samples for pixels in sample.vit_pixels],
        groups=[sample.group for sample in samples],
        keys=[sample.key for sample in samples],
        origins=[sample.origin for sample in samples],
    )


def _blank(geometry: Geometry) -> PlannedSample:
    return plan_sample(Sample([Item("text", text_ids=[])], (-1, -1, -1), BLANK, "no sample was left"), geometry)


def _tensor(picture: np.ndarray) -> Tensor:
    """Channels first; what was encoded before is so already."""
    tensor = torch.from_numpy(picture)
    if tensor.dtype == BFLOAT16_BITS:
        return tensor.view(torch.bfloat16)
    return tensor.permute(2, 0, 1).contiguous() if tensor.dtype == torch.uint8 else tensor
