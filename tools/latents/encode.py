"""Encodes the pictures of a stretch of rows and writes them, in one process on one device.

Which rows are left and which process takes them is decided by the caller.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megabagel.checkpoint.hf import open_source
from megabagel.checkpoint.names import fill_shard, rule_for
from megabagel.config.datasets import GroupConfig
from megabagel.config.paths import autoencoder_path, tokenizer_path
from megabagel.config.schema import Config
from megabagel.data.faults import Fault
from megabagel.data.stored import Kind
from megabagel.data.stored_writer import PartWriter
from megabagel.data.text import Tokenizer
from megabagel.models.autoencoder import Autoencoder, load_autoencoder
from megabagel.models.build import DTYPES
from megabagel.models.vision import VisionTower
from megabagel.packing.geometry import grid_position_ids
from megabagel.training.encode_latents import moments_of
from megabagel.training.encode_vision import features_of
from tools.latents.pictures import GroupPictures, Picture

PIXELS_TOGETHER, ROWS_TOGETHER = 2**22, 256  # at most, give or take a row, of what is encoded together


@dataclass(frozen=True)
class Stretch:
    """Rows of a group, of which the pictures of some kinds are to be stored."""

    group: str
    first: int
    stop: int
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class Settings:
    """What all stretches have in common; travels to worker processes."""

    config: Config
    groups: dict[str, GroupConfig]
    out: Path
    kinds: tuple[Kind, ...]  # kinds that any stretch may ask for
    dtype: str
    shard_bytes: int
    processes: int


class Encoders:
    """The networks on this process's device, in the precision of training."""

    def __init__(self, config: Config, kinds: tuple[Kind, ...], process: int = 0) -> None:
        """Raises AutoencoderError or CheckpointError when weights are missing or damaged."""
        gpus = torch.cuda.device_count()
        self.device = torch.device("cuda", process % gpus) if gpus else torch.device("cpu")
        self.dtype, self.vit = DTYPES[config.training.params_dtype], config.model.vit
        self._interpolate = config.model.interpolate_pos
        self.autoencoder: Autoencoder | None = None
        self.tower: VisionTower | None = None
        if "vae_image" in kinds:
            self.autoencoder = load_autoencoder(autoencoder_path(config)).to(self.device, self.dtype)
        if "vit_image" in kinds:
            self.tower = load_tower(config).to(self.device)

    def encode(self, pictures: list[Picture]) -> list[Tensor]:
        """Moments [2z, h, w] or features [n, hidden] of each picture, on the CPU."""
        encoded: dict[int, Tensor] = {}
        for kind, run in (("vae_image", self._moments), ("vit_image", self._features)):
            places = [place for place, picture in enumerate(pictures) if picture.kind == kind]
            images = [torch.from_numpy(pictures[place].pixels).permute(2, 0, 1) for place in places]
            if images:
                encoded |= dict(zip(places, run(images), strict=True))
        return [encoded[place].cpu() for place in range(len(pictures))]

    def _moments(self, images: list[Tensor]) -> list[Tensor]:
        return moments_of(self.autoencoder, images, self.device, self.dtype)

    def _features(self, images: list[Tensor]) -> list[Tensor]:
        return features_of(self.tower, images, [self._position_ids(*image.shape[1:]) for image in images], self.device)

    def _position_ids(self, height: int, width: int) -> Tensor:
        grid = height // self.vit.patch_size, width // self.vit.patch_size
        ids = grid_position_ids(*grid, self.vit.max_num_patch_per_side, self._interpolate)
        return torch.tensor(ids, dtype=torch.int64)


@torch.no_grad()
def load_tower(config: Config) -> VisionTower:
    """The ViT as a run with this configuration starts with it. Raises CheckpointError."""
    tower = VisionTower(config.model.vit, DTYPES[config.training.params_dtype]).requires_grad_(False).eval()
    source = open_source(config)
    for name, weight in tower.named_parameters():
        fill_shard(weight, source, rule_for(f"vision.{name}", weight.shape, 0, 1, config.model), 0, 1)
    source.close()
    return tower


class StretchEncoder:
    """Works through stretches of rows in this process."""

    def __init__(self, settings: Settings, process: int = 0) -> None:
        torch.set_num_threads(max(1, torch.get_num_threads() // settings.processes))
        self._settings = settings
        self._dtype = DTYPES[settings.dtype]
        self._encoders = Encoders(settings.config, settings.kinds, process)
        self._tokenizer = Tokenizer(tokenizer_path(settings.config))
        self._opened: dict[str, GroupPictures] = {}

    def run(self, stretch: Stretch, report: Callable[[int], None]) -> None:
        """Store the pictures of the stretch; `report` is told the number of rows whenever some are done.

        If it is interrupted, finished rows are written all the same.
        """
        settings = self._settings
        if stretch.group not in self._opened:
            group = settings.groups[stretch.group]
            self._opened[stretch.group] = GroupPictures(settings.config, stretch.group, group, self._tokenizer)
        writers = {
            kind: PartWriter(
                settings.out / stretch.group / kind, stretch.group, kind, stretch.first, settings.shard_bytes
            )
            for kind in stretch.kinds
        }
        done = stretch.first
        try:
            while done < stretch.stop:
                rows = self._read(stretch, done)
                self._write(rows, writers)
                done += len(rows)
                report(len(rows))
        finally:
            for writer in writers.values():
                writer.close(done)

    def _read(self, stretch: Stretch, row: int) -> list[tuple[int, list[Picture] | Fault]]:
        """As many rows, from `row` on, as are encoded together: number and pictures."""
        source, rows, pixels = self._opened[stretch.group], [], 0
        while row < stretch.stop and pixels < PIXELS_TOGETHER and len(rows) < ROWS_TOGETHER:
            pictures = source.of_row(row, stretch.kinds)
            if not isinstance(pictures, Fault):
                pixels += sum(height * width for height, width in (picture.size for picture in pictures))
            rows.append((row, pictures))
            row += 1
        return rows

    def _write(self, rows: list[tuple[int, list[Picture] | Fault]], writers: dict[Kind, PartWriter]) -> None:
        pictures = [picture for _, found in rows if not isinstance(found, Fault) for picture in found]
        encoded = iter(self._encoders.encode(pictures))
        for row, found in rows:
            if isinstance(found, Fault):
                for writer in writers.values():
                    writer.bad(row, found)
            else:
                for picture in found:
                    values = next(encoded).to(self._dtype)
                    writers[picture.kind].add(row, picture.number, picture.before, picture.size, values)
            for writer in writers.values():
                writer.end_row(row)
