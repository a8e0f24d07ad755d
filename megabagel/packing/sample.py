"""The one sample schema that every source produces: a list of items in reading order.

A sample holds decoded content (token ids, uint8 pictures) and what carries a loss. It knows nothing of packing,
parallel layout or models.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

ItemType = Literal["text", "vit_image", "vae_image"]


@dataclass
class Item:
    """One entry of a sample.

    text: `text_ids` without the start and end tokens. Images: `pixels` uint8 [H, W, 3] at their final size, or only
    that `size` (height, width) as long as the pixels are not read.
    `special_token_label` set: the item's closing token is a loss row with this label.
    """

    type: ItemType
    loss: bool = False
    enable_cfg: bool = False  # may be dropped so that the model learns the unconditional branch
    text_ids: list[int] | None = None
    pixels: np.ndarray | None = None
    size: tuple[int, int] | None = None
    special_token_label: int | None = None
    split_start: bool = True  # video frames may share one split
    split_end: bool = True
    frame_delta: int | None = None  # RoPE step after a video frame


@dataclass
class Sample:
    """Items in order. `key` identifies the visit (group, source row, visit number) and seeds every random draw about
    this sample, so that the draws do not depend on workers, packing or parallel layout."""

    items: list[Item]
    key: tuple[int, ...]
    group: str  # dataset group of the configuration, for logs
    origin: str  # file and row, for messages
