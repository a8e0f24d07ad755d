"""Pictures as PNG files that say how they were made."""

import json
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def save_png(image: Image.Image, path: Path, prompt: str, seed: int, settings: dict) -> None:
    """Write `path`, its folder too; the text fields `prompt`, `seed` and `settings` (JSON) are in the file."""
    information = PngInfo()
    for key, value in (("prompt", prompt), ("seed", str(seed)), ("settings", json.dumps(settings))):
        information.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG", pnginfo=information)
