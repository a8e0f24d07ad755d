"""Pictures as PNG files that say how they were made."""

import io
import json
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def png_bytes(image: Image.Image, prompt: str, seed: int, settings: dict) -> bytes:
    """The file; the text fields `prompt`, `seed` and `settings` (JSON) are in it."""
    information = PngInfo()
    for key, value in (("prompt", prompt), ("seed", str(seed)), ("settings", json.dumps(settings))):
        information.add_itxt(key, value)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=information)
    return file.getvalue()


def save_png(image: Image.Image, path: Path, prompt: str, seed: int, settings: dict) -> None:
    """Write `path`, its folder too; see `png_bytes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(image, prompt, seed, settings))
