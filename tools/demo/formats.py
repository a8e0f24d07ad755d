"""Writes the files of the official BAGEL formats: pictures and rows of parquet, JSON, and `data.yaml` over them.

What a row of each kind holds is said where the samples are made: captions.py, edits.py and questions.py.
It is not the trainer's reader, which is megabagel.config.datasets and megabagel.data.
"""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

SIDE = 64  # pixels; easy-vqa comes in this size
ROWS_PER_GROUP = 64


def encode_png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(rows: list[dict], schema: pa.Schema, folder: Path, files: int) -> dict[str, int]:
    """Rows dealt round robin over files; returns the row groups of each file."""
    folder.mkdir(parents=True)
    groups = {}
    for index in range(min(files, len(rows))):
        file = folder / f"{index:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[index::files], schema), file, row_group_size=ROWS_PER_GROUP)
        groups[file.name] = pq.ParquetFile(file).num_row_groups
    return groups


def write_json(content: object, file: Path) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def data_config(counts: dict[str, int], val: bool) -> dict:
    """`data.yaml` under the official keys; paths count from the file's folder."""
    split = "_val" if val else ""
    vae = {"image_stride": 16, "max_image_size": SIDE, "min_image_size": SIDE}
    vit = {"image_stride": 8, "max_image_size": SIDE, "min_image_size": SIDE}

    def group(name: str, paths: dict, total: int, files: int, weight: float, **transforms: dict) -> dict:
        return {
            "dataset_names": [name],
            "datasets": {name: paths | {"num_files": files, "num_total_samples": total}},
            **transforms,
            "is_mandatory": True,
            "weight": weight,
            "num_used_data": [files if "jsonl_path" not in paths else total],
        }

    def files(kind: str) -> int:
        return min(1 if val else 4, counts[kind + split])

    t2i, edit, vlm = (kind + split for kind in ("t2i", "edit", "vlm"))
    return {
        "t2i_pretrain": group(
            "emojis", {"data_dir": t2i}, counts[t2i], files("t2i"), 3.6, image_transform_args=dict(vae)
        ),
        "unified_edit": group(
            "emoji_edits",
            {"data_dir": edit, "parquet_info_path": f"{edit}_info.json"},
            counts[edit],
            files("edit"),
            3.0,
            image_transform_args=dict(vae),
            vit_image_transform_args=dict(vit),
        ),
        "vlm_sft": group(
            "easy_vqa",
            {"data_dir": "vlm/images", "jsonl_path": f"vlm/{vlm}.jsonl"},
            counts[vlm],
            1,
            0.85,
            image_transform_args=dict(vit),
        ),
    }


def with_latents(config: dict, folder: str) -> dict:
    """The same with the stored latents of the groups that generate pictures, in `folder` beside the data file."""
    generating = ("t2i_pretrain", "unified_edit")
    return {
        name: group | {"latents_dir": f"{folder}/{name}"} if name in generating else group
        for name, group in config.items()
    }


def write_data_yaml(config: dict, file: Path, note: str) -> None:
    file.write_text(f"# {note}\n" + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
