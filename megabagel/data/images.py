"""Pictures: size from the header, decoding to upright RGB, BAGEL's resize rule. Nothing is allocated before the size is
known to be allowed. Normalisation is the model's business, and which sizes a group wants is decided in `prepare.py`."""

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from megabagel.config.datasets import ImageTransformArgs, is_url
from megabagel.config.schema import DataConfig
from megabagel.data.faults import DataError, DataFault
from megabagel.data.files import storage

# Other formats of Pillow are rare in data sets, and some of them start programs or hide a second, larger picture.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
MAX_PIXELS = DataConfig.max_image_pixels
MAX_BYTES_PER_PIXEL = 8  # sixteen bits in four channels; larger files than that hold no picture of the allowed size
_MAX_METADATA = 16 << 20  # bytes of one unpacked PNG text or colour profile; Pillow's 1 MiB refuses ordinary scans
_BAND_ROWS = 256
_TILE_SIDES = (322, 323)  # TIFF tags
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112

PngImagePlugin.MAX_TEXT_CHUNK = _MAX_METADATA
PngImagePlugin.MAX_TEXT_MEMORY = 4 * _MAX_METADATA
Image.MAX_IMAGE_PIXELS = None  # the limit is checked here, where it is known, before anything is decoded
warnings.filterwarnings("ignore", module=r"PIL\..*")  # about metadata; what matters is raised


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


def header_size(source: bytes | str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of the upright picture (of the first one in the file) without decoding it.

    `source`: encoded bytes, a local path or a URL. Raises DataFault (missing_file, unreadable_file, image_bomb,
    undecodable_image).
    """
    with _faults_of(source), _opened(source, max_pixels) as picture:
        width, height = picture.size
        return (height, width) if _orientation(picture) in (5, 6, 7, 8) else (width, height)


def decode(source: bytes | str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright RGB picture (the first one in the file), transparency on white.

    Raises DataFault as `header_size` does, and nan_pixels for a float picture with values that are not finite.
    """
    with _faults_of(source), _opened(source, max_pixels) as picture:
        claimed, orientation = picture.size, _orientation(picture)
        picture.load()
        if picture.size != claimed:
            raise DataFault("undecodable_image", f"image is {picture.size} pixels, but its header says {claimed}")
        image = picture if orientation == 1 else picture.transpose(_TURNS[orientation])
        return _to_rgb(image)


def resize(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Pixels at `size` (width, height), uint8 [H, W, 3], writable and contiguous."""
    resized = image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
    return np.array(resized, dtype=np.uint8)


@contextmanager
def _opened(source: bytes | str, max_pixels: int) -> Iterator[Image.Image]:
    """The picture with its header read and its size checked."""
    with _stream(source, max_pixels * MAX_BYTES_PER_PIXEL) as stream, Image.open(stream, formats=FORMATS) as picture:
        _check_area(*picture.size, max_pixels)
        if isinstance(picture, TiffImagePlugin.TiffImageFile):  # a tile may be larger than the picture
            _check_area(*(picture.tag_v2.get(tag, 1) for tag in _TILE_SIDES), max_pixels)
        yield picture


def _check_area(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise DataFault("undecodable_image", f"image is {width} x {height} pixels, it has none")
    if width * height > max_pixels:
        raise DataFault(
            "image_bomb", f"image is {width} x {height} pixels, more than data.max_image_pixels = {max_pixels}"
        )


def _stream(source: bytes | str, max_bytes: int) -> BinaryIO:
    """The encoded picture. Only regular files: a pipe would block and a device never end."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if is_url(source):
        try:
            content = storage.read(source, 0, max_bytes + 1)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataFault("unreadable_file", f"image {source} cannot be read: {error}") from None
        _check_bytes(source, len(content), max_bytes)
        return io.BytesIO(content)
    status = os.stat(source)
    if not stat.S_ISREG(status.st_mode):
        raise DataFault("unreadable_file", f"image {source} is not a file")
    _check_bytes(source, status.st_size, max_bytes)
    return open(source, "rb")


def _check_bytes(name: str, size: int, most: int) -> None:
    if size > most:
        raise DataFault("image_bomb", f"image {name} has more than {most} bytes, as much as data.max_image_pixels need")


@contextmanager
def _faults_of(source: bytes | str) -> Iterator[None]:
    """Turn whatever reading a picture raises into a DataFault."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else f"file {source!r}"
    try:
        yield
    except (DataFault, DataError):
        raise
    except FileNotFoundError:
        raise DataFault("missing_file", f"image {source!r} does not exist") from None
    except UnidentifiedImageError:
        allowed = ", ".join(FORMATS)
        raise DataFault(
            "undecodable_image", f"image ({name}) cannot be decoded: unknown format, or none of {allowed}"
        ) from None
    except MemoryError:
        raise DataFault("image_bomb", f"image ({name}) needs more memory than its size explains") from None
    except Exception as error:  # hostile bytes make the decoders raise anything
        if isinstance(error, OSError) and error.errno is not None:
            raise DataFault("unreadable_file", f"image ({name}) cannot be read: {error.strerror}") from None
        kind = "image_bomb" if "MAX_TEXT" in str(error) else "undecodable_image"
        raise DataFault(kind, f"image ({name}) cannot be decoded: {error or type(error).__name__}") from None


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation 1 to 8 as far as the header tells it; 1 where it is absent or broken."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):  # Pillow turns these itself
        return 1
    try:  # the method of PNG decodes the picture to look for metadata behind it
        orientation = Image.Image.getexif(picture).get(_ORIENTATION, 1)
    except Exception:  # broken metadata do not make the pixels unusable
        return 1
    return orientation if orientation in _TURNS else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" and not all(np.isfinite(np.asarray(band)).all() for _, band in _bands(image)):
        raise DataFault("nan_pixels", "image has float pixels that are NaN or infinite")
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey values instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, (255, 255, 255))
    for top, band in _bands(image):
        rgba = band.convert("RGBA")
        white.paste(rgba, (0, top), mask=rgba)
    return white


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Some rows at a time and where they begin: whole copies of a large picture add up to several times its size."""
    for top in range(0, image.height, _BAND_ROWS):
        yield top, image.crop((0, top, image.width, min(top + _BAND_ROWS, image.height)))
