"""Pictures of the page: pixels as data URIs, and the attention of a pack with strips that say what the rows are."""

import base64
import io
from itertools import accumulate

import numpy as np
from PIL import Image
from torch import Tensor

from inspection import attention
from inspection.items import PackedSample
from megabagel.packing.plan import CAUSAL, FULL, NOISE, PackPlan

MODE_NAMES = {CAUSAL: "causal: a text", FULL: "full: a shown picture", NOISE: "noise: seen by itself only"}
SIDE = 512  # cells
STRIP = 14  # width of the strips, in the picture's 512 units
SMALL = 128 * 128  # pictures up to this many pixels are shown without loss


def data_uri(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3 or 4]; PNG where small or transparent, else JPEG."""
    lossless = pixels.shape[-1] == 4 or pixels.shape[0] * pixels.shape[1] <= SMALL
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG" if lossless else "JPEG", quality=88, optimize=True)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_uri(image: Tensor) -> str:
    """uint8 [3, H, W]."""
    return data_uri(image.permute(1, 2, 0).contiguous().numpy())


def attention_svg(plan: PackPlan, samples: list[PackedSample]) -> str:
    """The attention pattern in 512 units with a strip of item kinds above and at the left."""
    total, side = plan.sequence_length, SIDE + STRIP
    unit = SIDE / total
    uri = data_uri(attention.picture(plan, SIDE))
    place = f'x="{STRIP}" y="{STRIP}" width="{SIDE}" height="{SIDE}" preserveAspectRatio="none"'
    sharp = ' style="image-rendering:pixelated"' if total <= SIDE else ""  # a cell is a token
    parts = [f'<image {place}{sharp} href="{uri}"/>']
    for sample in samples:
        for item in sample.items:
            at, long = f"{STRIP + item.start * unit:.2f}", f"{item.tokens * unit:.2f}"
            for box in (
                f'x="{at}" y="0" width="{long}" height="{STRIP - 4}"',
                f'y="{at}" x="0" height="{long}" width="{STRIP - 4}"',
            ):
                tip = f"{item.kind}, {item.tokens:,} tokens from {item.start:,}"
                parts.append(f'<rect {box} style="fill:var(--{item.kind})"><title>{tip}</title></rect>')
    for end in list(accumulate(sample.tokens for sample in samples))[:-1]:
        at = f"{STRIP + end * unit:.2f}"
        parts.append(f'<path class="edge" d="M{STRIP} {at}H{side}M{at} {STRIP}V{side}"/>')
    label = f"attention pattern of {total:,} tokens"
    return f'<svg class="attention" viewBox="0 0 {side} {side}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def mode_colours() -> list[tuple[str, str]]:
    """Name and CSS colour of each mode, for the legend."""
    return [(name, "rgb({}, {}, {})".format(*attention.COLOURS[mode])) for mode, name in MODE_NAMES.items()]
