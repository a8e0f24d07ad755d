"""Files for the data benchmark: photograph-like JPEGs in the three official formats, and the data file over them.

Half text to image, a quarter edits, a quarter conversations, as in `packs/mix.py`; made once per folder.
"""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

ASPECTS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
ROWS_PER_GROUP = 32  # of parquet
WORDS = "a red cat sits near the harbor while golden light falls on old stone walls and quiet green water".split()
OFFICIAL = {"vae": (16, 1024, 512), "edit_vit": (14, 518, 224), "vlm": (14, 980, 378)}  # stride, most, least
TINY = {"vae": (16, 64, 16), "edit_vit": (14, 56, 14), "vlm": (14, 56, 14)}


def write_files(folder: Path, rows: int, sides: tuple[int, int], sizes: dict[str, tuple[int, int, int]]) -> Path:
    """Write `rows` samples with pictures whose long side is drawn from `sides` (pixels), to be resized to `sizes`
    (OFFICIAL or TINY); returns the data file."""
    file = folder / "data.yaml"
    if file.exists():
        return file
    draw = np.random.default_rng(11)
    half, quarter = rows // 2, rows // 4
    (folder / "chats").mkdir(parents=True)
    for name in ("t2i", "edit"):
        (folder / name).mkdir()
    t2i = {
        "image": [_jpeg(draw, sides) for _ in range(half)],
        "captions": [json.dumps({"short": _text(draw, 10, 30), "long": _text(draw, 40, 120)}) for _ in range(half)],
    }
    edit = {
        "image_list": [[_jpeg(draw, sides) for _ in range(2)] for _ in range(quarter)],
        "instruction_list": [[[_text(draw, 5, 25), _text(draw, 5, 25)]] for _ in range(quarter)],
    }
    pq.write_table(pa.table(t2i), folder / "t2i" / "0.parquet", row_group_size=ROWS_PER_GROUP)
    pq.write_table(pa.table(edit), folder / "edit" / "0.parquet", row_group_size=ROWS_PER_GROUP)
    with (folder / "chats" / "rows.jsonl").open("w") as lines:
        for row in range(quarter):
            (folder / "chats" / f"{row}.jpg").write_bytes(_jpeg(draw, sides))
            turns = [(("human", "gpt")[i % 2], _text(draw, 6, 80)) for i in range(2 * int(draw.integers(1, 8)))]
            turns[0] = ("human", "<image>\n" + turns[0][1])
            conversation = [{"from": who, "value": text} for who, text in turns]
            lines.write(json.dumps({"image": f"{row}.jpg", "conversations": conversation}) + "\n")
    file.write_text(yaml.safe_dump(_groups(sizes), sort_keys=False))
    return file


def _groups(sizes: dict[str, tuple[int, int, int]]) -> dict:
    names = ("image_stride", "max_image_size", "min_image_size")
    args = {use: dict(zip(names, size, strict=True)) for use, size in sizes.items()}
    return {
        "t2i_pretrain": {
            "weight": 2.0,
            "is_mandatory": True,
            "image_transform_args": dict(args["vae"]),
            "datasets": {"photos": {"data_dir": "t2i"}},
        },
        "unified_edit": {
            "weight": 1.0,
            "image_transform_args": dict(args["vae"]),
            "vit_image_transform_args": args["edit_vit"],
            "datasets": {"edits": {"data_dir": "edit"}},
        },
        "vlm_sft": {
            "weight": 1.0,
            "image_transform_args": args["vlm"] | {"max_pixels": 2_007_040},
            "datasets": {"chats": {"jsonl_path": "chats/rows.jsonl", "data_dir": "chats"}},
        },
    }


def _jpeg(draw: np.random.Generator, sides: tuple[int, int]) -> bytes:
    """Smooth shapes with grain: about as many bytes per pixel as a photograph."""
    aspect, long = ASPECTS[draw.integers(len(ASPECTS))], int(draw.integers(sides[0], sides[1] + 1))
    size = tuple(max(16, long * side // max(aspect)) for side in aspect)
    shapes = Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(shapes.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    grain = draw.integers(-6, 7, (size[1], size[0], 1), dtype=np.int16)
    stream = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _text(draw: np.random.Generator, shortest: int, longest: int) -> str:
    return " ".join(draw.choice(WORDS, int(draw.integers(shortest, longest + 1))))
