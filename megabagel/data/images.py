"""Pictures: decode to RGB, resize by BAGEL's rule, hand on uint8 pixels. Normalisation is the model's business."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from megabagel.config.datasets import ImageTransformArgs
from megabagel.data.faults import DataFault


def target_size(width: int, height: int, args: ImageTransformArgs, num_images: int = 1) -> tuple[int, int]:
    """Width and height after resizing; `num_images` pictures share the pixel budget.

    Short pictures grow to `min_image_size` even if the long side then passes `max_image_size`; the last step undoes
    that. The pixel budget scales both sides by the area ratio, not by its root, as in BAGEL: such pictures end up
    smaller than they had to be. Rounding may leave a side one stride above a limit.
    """
    stride, budget = args.image_stride, args.max_pixels / num_images
    scale = max(min(args.max_image_size / max(width, height), 1.0), args.min_image_size / min(width, height))
    width, height = _scaled(width, scale, stride), _scaled(height, scale, stride)
    if width * height > budget:
        scale = budget / (width * height)
        width, height = _scaled(width, scale, stride), _scaled(height, scale, stride)
    if max(width, height) > args.max_image_size:
        scale = args.max_image_size / max(width, height)
        width, height = _scaled(width, scale, stride), _scaled(height, scale, stride)
    return width, height


def _scaled(side: int, scale: float, stride: int) -> int:
    """Scaled side, rounded to pixels and then to the stride, at least one stride."""
    return max(stride, round(round(side * scale) / stride) * stride)


def decode(source: bytes | str | Path) -> Image.Image:
    """Encoded bytes or a file's path as an upright RGB picture, transparency on white.

    Raises DataFault (missing_file, undecodable_image).
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except FileNotFoundError:
        raise DataFault("missing_file", f"image {source} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = f"{len(source)} bytes" if isinstance(source, bytes) else f"file {source}"
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataFault("undecodable_image", f"image ({name}) cannot be decoded: {reason}") from None
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey values instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def to_pixels(image: Image.Image, args: ImageTransformArgs, num_images: int = 1) -> np.ndarray:
    """Resized picture, uint8 [H, W, 3], writable and contiguous."""
    size = target_size(image.width, image.height, args, num_images)
    resized = image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
    return np.array(resized, dtype=np.uint8)
