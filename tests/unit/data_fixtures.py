"""Tiny data sets in the three official formats, written on the fly, and a reader over them."""

import io
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from megabagel.config.datasets import DatasetPaths, GroupConfig, ImageTransformArgs
from megabagel.config.schema import DataConfig
from megabagel.data.reader import Reader
from megabagel.data.text import Tokenizer
from megabagel.packing.geometry import Geometry

TOKENIZER = str(Path(__file__).parents[1] / "golden" / "public-basic" / "ckpt")
TRANSFORM = ImageTransformArgs(image_stride=16, max_image_size=64, min_image_size=16)
VIT_TRANSFORM = ImageTransformArgs(image_stride=14, max_image_size=56, min_image_size=14)
DROPOUT_OFF = {"text_cond_dropout_prob": 0.0, "vit_cond_dropout_prob": 0.0, "vae_cond_dropout_prob": 0.0}


def png(number: int, size: tuple[int, int] = (20, 12)) -> bytes:
    """A one-colour picture, width and height as given."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict], rows_per_group: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=rows_per_group)


def t2i_rows(numbers) -> list[dict]:
    return [
        {"image": png(n, (16 + n % 40, 20)), "captions": json.dumps({"a": f"cat {n}", "b": f"tree {n} " * (n % 7)})}
        for n in numbers
    ]


def edit_rows(numbers, length: int = 3) -> list[dict]:
    return [
        {
            "image_list": [png(n + i) for i in range(length)],
            "instruction_list": [[f"make it {n + i}", f"turn to {n + i}"] for i in range(1, length)],
        }
        for n in numbers
    ]


def t2i_group(folder: Path, num_rows: int = 24, **fields) -> GroupConfig:
    """Two parquet files with row groups of 4."""
    write_parquet(folder / "t2i" / "0.parquet", t2i_rows(range(num_rows // 2)))
    write_parquet(folder / "t2i" / "1.parquet", t2i_rows(range(num_rows // 2, num_rows)))
    paths = str(folder / "t2i")
    return GroupConfig({"one": DatasetPaths(data_dir=paths, path=paths)}, TRANSFORM, format="t2i_pretrain", **fields)


def edit_group(folder: Path, num_rows: int = 10, **fields) -> GroupConfig:
    write_parquet(folder / "edit" / "0.parquet", edit_rows(range(num_rows)))
    paths = {"one": DatasetPaths(data_dir=str(folder / "edit"), path=str(folder / "edit"))}
    return GroupConfig(paths, TRANSFORM, format="unified_edit", vit_image_transform_args=VIT_TRANSFORM, **fields)


def vlm_group(folder: Path, lines: list | None = None, **fields) -> GroupConfig:
    """`lines`: objects, or strings written as they are."""
    (folder / "vlm").mkdir(parents=True, exist_ok=True)
    for n in range(3):
        (folder / "vlm" / f"{n}.png").write_bytes(png(n, (28, 30)))
    if lines is None:
        lines = [vlm_line(n) for n in range(12)]
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    (folder / "vlm" / "data.jsonl").write_text(text)
    paths = DatasetPaths(path=str(folder / "vlm" / "data.jsonl"), data_dir=str(folder / "vlm"))
    return GroupConfig({"one": paths}, VIT_TRANSFORM, format="vlm_sft", **fields)


def vlm_line(n: int) -> dict:
    """Text only, one picture or two, in turns."""
    pictures = n % 3
    line = {
        "conversations": [
            {"from": "human", "value": "<image>\n" * pictures + f"How many {n}?"},
            {"from": "gpt", "value": f"There are {n}."},
        ]
    }
    if pictures:
        line["image"] = "0.png" if pictures == 1 else ["1.png", "2.png"]
    return line


def data_config(**fields) -> DataConfig:
    values = {
        "expected_num_tokens": 120,
        "max_num_tokens": 130,
        "max_num_tokens_per_sample": 120,
        "prefer_buffer_before": 60,
        "max_buffer_size": 4,
        "num_workers": 0,
        "max_bad_fraction": 1.0,
    }
    return DataConfig(**{**values, **fields})


@lru_cache
def _tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER)


def reader_arguments(**fields) -> tuple[DataConfig, Tokenizer, Geometry]:
    """What the golden checkpoint's readers are made with; `fields` of DataConfig."""
    tokenizer = _tokenizer()
    return data_config(**fields), tokenizer, Geometry(16, 8, 14, 8, tokenizer.special)


_READER_FIELDS = (
    "global_batch_size",
    "exchange",
    "cost_model",
    "faults_file",
    "visual_und",
    "visual_gen",
    "max_packs",
)


def make_reader(groups: dict[str, GroupConfig], rank: int = 0, size: int = 1, **fields) -> Reader:
    """`fields` of DataConfig, or arguments of Reader."""
    arguments = {name: fields.pop(name) for name in _READER_FIELDS if name in fields}
    config, tokenizer, geometry = reader_arguments(**fields)
    return Reader(
        config,
        groups,
        tokenizer,
        geometry,
        tile=16,
        data_parallel_rank=rank,
        data_parallel_size=size,
        **arguments,
    )


def same_pack(a, b) -> bool:
    """Bitwise equality of two packs."""
    ours, theirs = vars(a.plan), vars(b.plan)
    equal = all(np.array_equal(np.asarray(ours[name]), np.asarray(theirs[name])) for name in ours)
    pictures = [(a.vae_images, b.vae_images), (a.vit_images, b.vit_images)]
    equal &= all(len(x) == len(y) and all(np.array_equal(p, q) for p, q in zip(x, y, strict=True)) for x, y in pictures)
    return equal and (a.groups, a.keys, a.origins) == (b.groups, b.keys, b.origins)
