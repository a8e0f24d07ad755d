"""A data pipeline as BAGEL's official trainer has it, in plain PyTorch: a packing IterableDataset in a DataLoader.

Each worker reads its share of the rows, decodes, resizes, turns pictures into normalised float tensors, tokenises and
packs greedily with lists that grow; pictures for the autoencoder are padded to the largest of the pack, those for the
ViT are cut into patches. Same resize rule, layout and budgets as megabagel. Not a reader to train with.
"""

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from packs import list_packer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megabagel.config.datasets import GroupConfig, ImageTransformArgs
from megabagel.config.schema import DataConfig
from megabagel.data.images import target_size
from megabagel.data.text import Tokenizer
from megabagel.packing.geometry import Geometry
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import PlannedSample, draw_dropout, plan_sample


@dataclass
class Loaded:
    """A sample with its pictures as float tensors [3, H, W], dropped ones included."""

    items: list[Item]
    tensors: list[Tensor | None]  # by item


def rgb(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    return image.convert("RGB")


def to_float(image: Image.Image, args: ImageTransformArgs) -> Tensor:
    """Resized and normalised to [-1, 1], as torchvision does it."""
    size = target_size(image.width, image.height, args)
    resized = image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
    return pixels.float().div_(255).sub_(0.5).div_(0.5)


class PackedStream(IterableDataset):
    """Packs without end: the tables of `list_packer` and the pictures as floats."""

    def __init__(self, groups: dict[str, GroupConfig], config: DataConfig, tokenizer: Tokenizer, geometry: Geometry):
        self.groups, self.config = groups, config
        self.tokenizer, self.geometry = tokenizer, geometry
        self.dropout = {
            "text": config.text_cond_dropout_prob,
            "vit_image": config.vit_cond_dropout_prob,
            "vae_image": config.vae_cond_dropout_prob,
        }

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        rank, size = (info.id, info.num_workers) if info else (0, 1)
        draw = random.Random(self.config.seed + rank)
        readers = {"t2i_pretrain": self.t2i, "unified_edit": self.edit, "vlm_sft": self.vlm}
        streams = {name: readers[name](group, rank, size, draw) for name, group in self.groups.items()}
        samples = {name: self.planned(name, stream) for name, stream in streams.items()}
        weights = [group.weight for group in self.groups.values()]
        buffer: list[tuple[PlannedSample, list[Tensor], list[Tensor]]] = []
        while True:
            yield self.pack(self.fill(samples, weights, buffer, draw))

    def fill(self, samples: dict[str, Iterator], weights: list[float], buffer: list, draw: random.Random) -> list:
        """Samples of the next pack: mandatory groups first, what waited before what is new below a fill."""
        config, chosen, tokens = self.config, [], 0
        for name, group in self.groups.items():
            if group.is_mandatory:
                chosen.append(next(samples[name]))
                tokens += chosen[-1][0].num_tokens
        while tokens < config.expected_num_tokens:
            if buffer and tokens < config.prefer_buffer_before:
                sample = buffer.pop(0)
                from_buffer = True
            else:
                sample = next(samples[draw.choices(list(samples), weights)[0]])
                from_buffer = False
            length = sample[0].num_tokens
            if length > config.max_num_tokens_per_sample:
                continue
            if tokens + length > config.max_num_tokens:
                if len(buffer) < config.max_buffer_size and not from_buffer:
                    buffer.append(sample)
                break
            chosen.append(sample)
            tokens += length
        return chosen

    def planned(self, name: str, stream: Iterator[Loaded]) -> Iterator[tuple[PlannedSample, list, list]]:
        """Condition dropout and layout of each sample, with the tensors that are kept."""
        for number, loaded in enumerate(stream):
            sample = Sample(loaded.items, (0, number, 0), name, f"{name} {number}")
            dropped = draw_dropout(sample, self.dropout, self.config.seed)
            planned = plan_sample(sample, self.geometry, dropped, seed=self.config.seed)
            yield (
                planned,
                [loaded.tensors[item] for item in planned.vae_items],
                [loaded.tensors[item] for item in planned.vit_items],
            )

    def pack(self, samples: list[tuple[PlannedSample, list[Tensor], list[Tensor]]]) -> dict:
        """Tables, padded autoencoder pictures [B, 3, H, W] and ViT patches [tokens, patch * patch * 3]."""
        batch = list_packer.pack([planned for planned, _, _ in samples], self.geometry)
        vae = [tensor for _, tensors, _ in samples for tensor in tensors]
        vit = [tensor for _, _, tensors in samples for tensor in tensors]
        if vae:
            sizes = [tensor.shape[1:] for tensor in vae]
            height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
            batch["padded_images"] = torch.zeros(len(vae), 3, height, width)
            for row, tensor in zip(batch["padded_images"], vae, strict=True):
                row[:, : tensor.shape[1], : tensor.shape[2]] = tensor
        if vit:
            batch["vit_tokens"] = torch.cat([self.patches(tensor) for tensor in vit])
        return batch

    def patches(self, tensor: Tensor) -> Tensor:
        side = self.geometry.stride("vit_image")
        rows, columns = tensor.shape[1] // side, tensor.shape[2] // side
        cut = tensor.reshape(3, rows, side, columns, side)
        return torch.einsum("chpwq->hwpqc", cut).reshape(rows * columns, side * side * 3)

    def t2i(self, group: GroupConfig, rank: int, size: int, draw: random.Random) -> Iterator[Loaded]:
        for row in self.parquet_rows(group, rank, size):
            picture = to_float(rgb(row["image"]), group.image_transform_args)
            caption = draw.choice(list(json.loads(row["captions"]).values()))
            yield Loaded([self.text(caption, cfg=True), image("vae_image", picture, loss=True)], [None, picture])

    def edit(self, group: GroupConfig, rank: int, size: int, draw: random.Random) -> Iterator[Loaded]:
        for row in self.parquet_rows(group, rank, size):
            before, after = (rgb(content) for content in row["image_list"][:2])
            shown = to_float(before, group.image_transform_args)
            seen = to_float(before, group.vit_image_transform_args)
            wanted = to_float(after, group.image_transform_args)
            items = [
                image("vae_image", shown, cfg=True),
                image("vit_image", seen, cfg=True),
                self.text(draw.choice(row["instruction_list"][0]), cfg=True),
                image("vae_image", wanted, loss=True),
            ]
            yield Loaded(items, [shown, seen, None, wanted])

    def vlm(self, group: GroupConfig, rank: int, size: int, draw: random.Random) -> Iterator[Loaded]:
        for paths in group.datasets.values():
            lines = Path(paths.path).read_text(encoding="utf-8").splitlines()
        while True:
            for line in lines[rank::size]:
                row = json.loads(line)
                content = Path(paths.data_dir, row["image"]).read_bytes()
                picture = to_float(rgb(content), group.image_transform_args)
                items, tensors = [image("vit_image", picture)], [picture]
                for turn in row["conversations"]:
                    items.append(self.text(turn["value"].replace("<image>\n", ""), loss=turn["from"] == "gpt"))
                    tensors.append(None)
                yield Loaded(items, tensors)

    def parquet_rows(self, group: GroupConfig, rank: int, size: int) -> Iterator[dict]:
        """Rows of this worker's row groups, again and again."""
        files = [file for paths in group.datasets.values() for file in sorted(Path(paths.path).glob("*.parquet"))]
        while True:
            for file in files:
                table = pq.ParquetFile(file)
                for row_group in list(range(table.num_row_groups))[rank::size]:
                    yield from table.read_row_group(row_group).to_pylist()

    def text(self, text: str, loss: bool = False, cfg: bool = False) -> Item:
        return Item("text", loss, cfg, text_ids=self.tokenizer.encode(text))


def image(kind: str, picture: Tensor, loss: bool = False, cfg: bool = False) -> Item:
    return Item(kind, loss, cfg, size=tuple(picture.shape[1:]))


def open_loader(stream: PackedStream, num_workers: int) -> DataLoader:
    """As the official trainer opens it: one pack per batch, two packs ahead per worker."""
    ahead = {"prefetch_factor": 2} if num_workers else {}
    return DataLoader(stream, batch_size=1, num_workers=num_workers, collate_fn=lambda packs: packs[0], **ahead)
