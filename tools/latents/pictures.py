"""All pictures that any visit of a row may show, with their pixels at the sizes in which training encodes them.

What is done with them is elsewhere. Frames of videos are left out: each visit draws other ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from megabagel.config.datasets import EDIT, GroupConfig
from megabagel.config.schema import Config
from megabagel.data.document import Entry, ImageSource, lay_out
from megabagel.data.faults import DataFault, Fault
from megabagel.data.images import header_size
from megabagel.data.prepare import Preparer
from megabagel.data.sources import open_source
from megabagel.data.stored import Kind
from megabagel.data.text import Tokenizer
from megabagel.packing.geometry import geometry_of

VIDEO, PAIR = "video", "pretrain_pair"
VISITS_FOR_BOTH_WAYS = 32  # a pair's direction is drawn: all of these agree once in four billion rows
VISITS_PER_PICTURE = 8  # of a chain of edits: its last picture is missed once in 100,000 rows, and then decoded later


@dataclass
class Picture:
    """A picture as it is encoded. Sizes are height and width."""

    kind: Kind
    number: int  # among the pictures of its row
    before: tuple[int, int]  # size of the upright picture before it was resized
    pixels: np.ndarray  # uint8 [H, W, 3]

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[:2]


class GroupPictures:
    """The pictures of one group, row by row."""

    def __init__(self, config: Config, name: str, group: GroupConfig, tokenizer: Tokenizer) -> None:
        """Raises DataError when the group cannot be read."""
        data = replace(
            config.data,
            text_cond_dropout_prob=0.0,
            vit_cond_dropout_prob=0.0,
            vae_cond_dropout_prob=0.0,
            max_num_tokens_per_sample=2**31,  # nothing is too long: no picture shrinks
            over_long="skip",
            token_cache=None,
        )
        model = config.model
        self._switches = {"visual_und": model.visual_und, "visual_gen": model.visual_gen}
        geometry = geometry_of(model, tokenizer.special)
        self._preparer = Preparer({name: group}, data, tokenizer, geometry, **self._switches)
        self._source = open_source(name, group, data.seed)
        self._format, self._most_pixels = group.format, data.max_image_pixels
        self.num_rows = sum(self._source.blocks)

    def of_row(self, row: int, kinds: tuple[Kind, ...]) -> list[Picture] | Fault:
        """All pictures of these kinds, or why the row cannot be used."""
        found: dict[tuple, Picture] = {}
        try:
            for entries in self._documents(row):
                for picture in self._pictures(entries, row, kinds):
                    found[picture.kind, picture.number, picture.size] = picture
        except DataFault as fault:
            return Fault(fault.kind, self._source.origin(row), str(fault))
        except MemoryError:
            raise
        except Exception as error:  # a row of an unforeseen shape must not end the work of days
            return Fault("bad_row", self._source.origin(row), repr(error))
        return list(found.values())

    def _documents(self, row: int) -> list[list[Entry]]:
        """Documents in which, together, all pictures of the row appear in all their uses."""
        if self._format == EDIT:
            return [_all_uses(self._edited(row))]
        visits = VISITS_FOR_BOTH_WAYS if self._format == PAIR else 1
        documents: dict[bool, list[Entry]] = {}  # whether it generates -> document
        for visit in range(visits):
            entries = self._document(row, visit)
            documents.setdefault(any(entry.image and entry.loss for entry in entries), entries)
        return list(documents.values())

    def _document(self, row: int, visit: int) -> list[Entry]:
        return self._source.document(row, (0, row, visit))

    def _edited(self, row: int) -> list[ImageSource]:
        """The pictures of a chain of which each visit draws a piece."""
        found: dict[int, ImageSource] = {}
        visit = 0
        while visit < VISITS_PER_PICTURE * len(found) or max(found, default=0) >= len(found):
            found |= {entry.image.number: entry.image for entry in self._document(row, visit) if entry.image}
            visit += 1
        return [found[number] for number in sorted(found)]

    def _pictures(self, entries: list[Entry], row: int, kinds: tuple[Kind, ...]) -> Iterator[Picture]:
        entries = [replace(entry, text="") if entry.image is None else entry for entry in entries]
        parts = lay_out(entries, **self._switches)
        planned = self._preparer.measure(0, entries, (0, row, 0), self._source.origin(row))
        if "vae_image" not in kinds:
            planned = replace(planned, vae_items=[])
        if "vit_image" not in kinds:
            planned = replace(planned, vit_items=[])
        planned = self._preparer.read(planned, 0, entries)
        before: dict[int, tuple[int, int]] = {}
        for kind, items, pixels in (
            ("vae_image", planned.vae_items, planned.vae_pixels),
            ("vit_image", planned.vit_items, planned.vit_pixels),
        ):
            for item, content in zip(items, pixels, strict=True):
                image = parts[item].image
                if image.number not in before:
                    source = image.path if image.content is None else image.content
                    before[image.number] = header_size(source, self._most_pixels)[::-1]
                yield Picture(kind, image.number, before[image.number], content)


def _all_uses(images: list[ImageSource]) -> list[Entry]:
    """A document that shows every picture to the autoencoder and the ViT, and generates one as edits do."""
    return [*(Entry(image=image) for image in images), Entry(image=images[0], loss=True)]
