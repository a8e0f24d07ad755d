"""Text-to-image samples: an emoji's picture with captions made from its name, as official T2I parquet.

Training and held-out emojis are written by the same function into folders of their own.
Which emojis these are is chosen in emojis.py.
"""

import json
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from tools.demo.emojis import Emoji, render_emoji
from tools.demo.formats import SIDE, encode_png, write_parquet


def captions_of(name: str) -> dict[str, str]:
    return {"name": name, "picture": f"a picture of {name}"}


def write_t2i(emojis: list[Emoji], folder: Path, files: int) -> None:
    """Official T2I parquet: `image` PNG bytes, `captions` JSON {name: caption}."""
    rows = [
        {
            "image": encode_png(render_emoji(e.svg, SIDE)),
            "captions": json.dumps(captions_of(e.name), ensure_ascii=False),
        }
        for e in tqdm(emojis, desc=folder.name, mininterval=1)
    ]
    write_parquet(rows, pa.schema([("image", pa.binary()), ("captions", pa.string())]), folder, files)
