"""Stored moments and features for the data benchmark, in the layout of tools/encode_latents.py, filled with noise.

Encoding the pictures takes hours on a CPU and changes nothing about how fast they are read: shapes and types are those
of BAGEL's encoders.
"""

from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from megabagel.config.datasets import GroupConfig, load_dataset_groups
from megabagel.config.schema import Config
from megabagel.data.faults import Fault
from megabagel.data.stored import Header, Kind, rows_of
from megabagel.data.stored_writer import PartWriter, prepare_folder
from megabagel.data.text import Tokenizer
from tools.latents.pictures import GroupPictures

MOMENTS, DOWNSAMPLE = 32, 8  # of the autoencoder
PATCH, HIDDEN = 14, 1152  # of the ViT
SHARD_BYTES = 512 << 20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def write_stored(file: Path, kinds: tuple[Kind, ...], tokenizer: Tokenizer, dtype: str) -> Path:
    """Store pictures of these kinds of all groups of data file `file` as `dtype` (bf16 or fp32), and write a data file
    that reads them beside it; returns that."""
    name = "_".join(("stored", dtype, *kinds))
    data = file.with_name(f"{name}.yaml")
    if data.exists():
        return data
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    for group_name, group in load_dataset_groups(str(file)).items():
        used = {"vae_image": group.vae_args, "vit_image": group.vit_args}
        there = tuple(kind for kind in kinds if used[kind] is not None)
        if there:
            content[group_name]["latents_dir"] = f"{name}/{group_name}"
            _store(file.with_name(name) / group_name, group_name, group, there, tokenizer, dtype)
    data.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return data


def _store(
    folder: Path, name: str, group: GroupConfig, kinds: tuple[Kind, ...], tokenizer: Tokenizer, dtype: str
) -> None:
    writers: dict[Kind, PartWriter] = {}
    for kind in kinds:
        args = group.vae_args if kind == "vae_image" else group.vit_args
        prepare_folder(folder / kind, Header(kind, "noise", dtype, asdict(args), rows_of(group)))
        writers[kind] = PartWriter(folder / kind, name, kind, 0, SHARD_BYTES)
    pictures = GroupPictures(Config(), name, group, tokenizer)
    for row in range(pictures.num_rows):
        found = pictures.of_row(row, kinds)
        if isinstance(found, Fault):
            raise RuntimeError(f"the benchmark's own files cannot be read: {found}")
        for picture in found:
            values = _noise(picture.kind, *picture.size).to(DTYPES[dtype])
            writers[picture.kind].add(row, picture.number, picture.before, picture.size, values)
        for writer in writers.values():
            writer.end_row(row)
    for writer in writers.values():
        writer.close(pictures.num_rows)


def _noise(kind: Kind, height: int, width: int) -> torch.Tensor:
    if kind == "vae_image":
        shape = (MOMENTS, height // DOWNSAMPLE, width // DOWNSAMPLE)
    else:
        shape = (height // PATCH * (width // PATCH), HIDDEN)
    return torch.randn(shape)
