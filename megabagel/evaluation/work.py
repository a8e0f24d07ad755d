"""One task being evaluated: its items, what the model made of them, and what scores need to be computed from that."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megabagel.data.images import decode
from megabagel.evaluation.items import Item
from megabagel.evaluation.settings import Models, Task
from megabagel.evaluation.share import Share
from megabagel.inference import FlowSettings, Generator, Guidance, TextSettings
from megabagel.inference.pictures import from_latents, to_latents, to_pixels
from megabagel.inference.png import save_png


@dataclass
class Work:
    """`folder` is the task's own. `make` fills `made`: per id an answer, or the name of a picture in `folder`."""

    task: Task
    items: list[Item]
    models: Models
    generator: Generator
    share: Share
    folder: Path
    made: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model and those of others are."""
        return self.generator.network.device

    def make(self) -> None:
        """Ask the model, as far as its answers and pictures are not there yet. Every rank calls it."""
        groups = self._groups()
        keys = [[self.items[number].id for number in group] for group in groups]
        self.made = self.share.spread(self.folder, "made", keys, lambda place: self._respond(groups[place]))

    def measure(
        self, name: str, kinds: Sequence[str], measure: Callable[[Sequence[int]], Sequence[object]]
    ) -> tuple[list[int], list[Any]]:
        """Numbers of the items of `kinds` and what `measure` finds for them; it is given some of these numbers. Every
        rank calls it."""
        numbers = [number for number, item in enumerate(self.items) if item.kind in kinds]
        size = self.task.batch_size
        groups = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        keys = [[self.items[number].id for number in group] for group in groups]
        found = self.share.spread(self.folder, name, keys, lambda place: measure(groups[place]))
        return numbers, [found[self.items[number].id] for number in numbers]

    def stamp(self, model: str) -> str:
        """Tells the files of one of `models` from others."""
        path = Path(getattr(self.models, model)).absolute()
        size = path.stat().st_size if path.is_file() else None
        return hashlib.sha256(f"{path} {size}".encode()).hexdigest()[:8]

    def picture(self, number: int) -> Image.Image:
        """The one made for that item."""
        return decode(str(self.folder / self.made[self.items[number].id]))

    def _groups(self) -> list[list[int]]:
        """Numbers of items that the model works on together: of one kind and size."""
        alike: dict[tuple, list[int]] = {}
        for number, item in enumerate(self.items):
            alike.setdefault((item.kind, item.height, item.width), []).append(number)
        size = self.task.batch_size
        return [group[start : start + size] for group in alike.values() for start in range(0, len(group), size)]

    def _respond(self, numbers: Sequence[int]) -> list[str]:
        items = [self.items[number] for number in numbers]
        if items[0].kind == "reconstruction":
            return [self._save(item, self._reconstruct(decode(item.target))) for item in items]
        prompts = [[*map(decode, item.images), item.text] for item in items]
        seeds = [item.seed for item in items]
        if items[0].kind == "answer":
            return self.generator.answers(prompts, TextSettings(self.task.max_tokens), seeds=seeds)
        size = {"height": items[0].height, "width": items[0].width}
        drawn = self.generator.pictures(prompts, self._flow, seeds=seeds, **size)
        return [self._save(item, one.image) for item, one in zip(items, drawn, strict=True)]

    @cached_property
    def _flow(self) -> FlowSettings:
        task = self.task
        low, high = task.cfg_interval
        guidance = Guidance(task.cfg_text_scale, task.cfg_img_scale, (low, high), task.cfg_renorm, task.cfg_renorm_min)
        return FlowSettings(task.num_timesteps, task.timestep_shift, guidance)

    def _reconstruct(self, image: Image.Image) -> Image.Image:
        """Through the autoencoder and back; the mean of the posterior is taken."""
        generator = self.generator
        pixels, autoencoder = generator.sizes.for_latents(image), generator.autoencoder
        stride, patch = autoencoder.config.downsample, generator.network.stage.model_config.latent_patch_size
        noise = torch.zeros(autoencoder.config.z_channels, pixels.shape[0] // stride, pixels.shape[1] // stride)
        tokens, grid = to_latents(autoencoder, pixels, noise, patch)
        return Image.fromarray(to_pixels(from_latents(autoencoder, tokens, grid, patch)))

    def _save(self, item: Item, image: Image.Image) -> str:
        name = f"pictures/{item.id.removesuffix('.png')}.png"
        if self.share.writes:
            save_png(image, self.folder / name, item.text, item.seed, {"images": list(item.images)})
        return name
