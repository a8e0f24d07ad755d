"""Editing parquet: `image_list` (N >= 2 encoded pictures) and `instruction_list` (N-1 lists of alternatives).

Instruction i turns picture i into picture i+1. Each visit draws a chain of one or two edits from it.
"""

from megabagel.config.datasets import GroupConfig
from megabagel.data.faults import DataFault
from megabagel.data.images import decode, to_pixels
from megabagel.data.parquet import ROW_GROUPS_IN_MEMORY, ParquetRows
from megabagel.data.sample import Item, Sample
from megabagel.data.text import Tokenizer
from megabagel.runtime import rng


class EditSource:
    """Source picture (VAE and ViT), then instruction and result, once or twice."""

    window = ROW_GROUPS_IN_MEMORY

    def __init__(self, name: str, group: GroupConfig, tokenizer: Tokenizer, seed: int) -> None:
        self._name, self._tokenizer, self._seed = name, tokenizer, seed
        self._vae_transform = group.image_transform_args
        self._vit_transform = group.vit_image_transform_args
        self._rows = ParquetRows(group.datasets, ["image_list", "instruction_list"], group.num_used_data)
        self.blocks, self.faults, self.origin = self._rows.blocks, self._rows.faults, self._rows.origin

    def sample(self, row: int, key: tuple[int, ...]) -> Sample:
        """Raises DataFault when the row cannot be used."""
        content = self._rows[row]
        images, instructions = content["image_list"] or [], content["instruction_list"] or []
        _check(images, instructions)
        draw = rng.generator(self._seed, "edit_chain", key)
        start = int(draw.integers(0, len(images) - 1))
        end = int(draw.integers(start + 1, min(start + 2, len(images) - 1) + 1))
        join = bool(draw.random() < 0.5) and end - start > 1
        steps = [instructions[i][int(draw.integers(0, len(instructions[i])))] for i in range(start, end)]

        items = self._seen(images[start])
        if join:
            items += [self._text(" ".join(f"{step}." for step in steps)), self._wanted(images[end])]
        else:
            for i, step in enumerate(steps, start + 1):
                items += [self._text(step), self._wanted(images[i])]
                if i < end:  # what was just made is what the next instruction works on
                    items += self._seen(images[i])
        return Sample(items, key, self._name, self.origin(row))

    def _text(self, text: str) -> Item:
        return Item("text", enable_cfg=True, text_ids=self._tokenizer.encode(text))

    def _wanted(self, image: bytes) -> Item:
        """The picture to be made."""
        return Item("vae_image", loss=True, pixels=to_pixels(decode(image), self._vae_transform))

    def _seen(self, image: bytes) -> list[Item]:
        """The picture as a condition, for the generation and the understanding side."""
        picture = decode(image)
        return [
            Item("vae_image", enable_cfg=True, pixels=to_pixels(picture, self._vae_transform)),
            Item("vit_image", enable_cfg=True, pixels=to_pixels(picture, self._vit_transform)),
        ]


def _check(images: list, instructions: list) -> None:
    if len(images) < 2:
        raise DataFault("bad_row", f"image_list has {len(images)} pictures; an edit needs at least 2")
    if len(instructions) != len(images) - 1 or not all(instructions):
        raise DataFault(
            "bad_row",
            f"instruction_list must hold {len(images) - 1} non-empty lists for {len(images)} pictures, "
            f"found {len([step for step in instructions if step])}",
        )
    if any(image is None for image in images) or any(text is None for step in instructions for text in step):
        raise DataFault("bad_row", "image_list or instruction_list holds a null")
