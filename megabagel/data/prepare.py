"""From a document to a planned sample, in two steps: `measure` (token ids and picture sizes) and `read` (pixels).

Only headers of pictures are read by the first, so that packs can be planned everywhere; files, formats and the order of
samples are not known here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from megabagel.config.datasets import GroupConfig, ImageTransformArgs
from megabagel.config.schema import DataConfig
from megabagel.data.document import Entry, ImageSource, Part, lay_out
from megabagel.data.faults import DataFault
from megabagel.data.images import decode, header_size, resize, target_size
from megabagel.data.over_long import cut_lengths, shrunk
from megabagel.data.text import Tokenizer
from megabagel.data.token_cache import TokenCache
from megabagel.packing.geometry import Geometry
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import VAE, VIT, PlannedSample, draw_dropout, plan_sample

MAX_BYTES_PER_TOKEN = 256  # far more than tokens of any text have on average; longer texts are not tokenised whole
_MAX_HALVINGS = 32
_REMEDIES = {
    "skip": "raise it, or set data.over_long to truncate_text or shrink_image",
    "truncate_text": "cutting its texts is not enough",
    "shrink_image": "shrinking its pictures is not enough",
}
_PICTURES = {VIT: "vit_image", VAE: "vae_image"}


class Known(Protocol):
    """What is known of a group's pictures without opening them."""

    def size(self, row: int, number: int) -> tuple[int, int] | None:
        """Width and height of a row's upright picture before it is resized; None: not known."""

    def lookup(self, row: int, number: int, kind: str, size: tuple[int, int]) -> np.ndarray | None:
        """Stored encoding of it as `kind` (vit_image or vae_image) at `size` (height, width); None: there is none."""

    def bytes_per_pixel(self, kind: str) -> float:
        """What a stored encoding takes in memory, by the pixels it stands for; 0: none are stored."""


@dataclass
class Preparer:
    """Prepares documents of all groups. Can be sent to worker processes."""

    groups: dict[str, GroupConfig]
    config: DataConfig
    tokenizer: Tokenizer
    geometry: Geometry
    visual_und: bool = True
    visual_gen: bool = True
    known: Sequence[Known | None] | None = None  # per group

    def __post_init__(self) -> None:
        config = self.config
        self._names, self._groups = list(self.groups), list(self.groups.values())
        self._dropout = {
            "text": config.text_cond_dropout_prob,
            "vit_image": config.vit_cond_dropout_prob,
            "vae_image": config.vae_cond_dropout_prob,
        }
        self._cache = TokenCache(config.token_cache, self.tokenizer.fingerprint) if config.token_cache else None

    def measure(self, group_index: int, entries: list[Entry], key: tuple[int, ...], origin: str) -> PlannedSample:
        """The sample of a document without pixels. `key`: group index, row, visit.

        Raises DataFault where the document cannot be used.
        """
        parts = self._lay_out(entries)
        sizes = self._sizes(group_index, parts, entries, key[1])
        items = [self._item(part, size) for part, size in zip(parts, sizes, strict=True)]
        sample = Sample(items, key, self._names[group_index], origin)
        dropped = draw_dropout(sample, self._dropout, self.config.seed)
        planned, most = self._plan(sample, dropped), self.config.max_num_tokens_per_sample
        if planned.num_tokens > most and self.config.over_long == "truncate_text":
            planned = self._truncate(sample, dropped, planned)
        elif planned.num_tokens > most and self.config.over_long == "shrink_image":
            planned = self._shrink(sample, dropped, planned)
        if planned.num_tokens > most:
            remedy = _REMEDIES[self.config.over_long]
            raise DataFault(
                "over_long", f"{planned.num_tokens} tokens, more than data.max_num_tokens_per_sample = {most}; {remedy}"
            )
        return planned

    def read(self, planned: PlannedSample, group_index: int, entries: list[Entry]) -> PlannedSample:
        """A copy of a measured sample with the pixels of its pictures, uint8 [H, W, 3], or what is stored of them.

        Each picture is decoded once. Raises DataFault where one cannot be decoded or changed since it was measured.
        """
        parts = self._lay_out(entries)
        sizes = _pixel_sizes(planned, self.geometry)
        num_images = _num_sharing(parts, entries)
        wanted: dict[int, list[tuple[int, int]]] = {}  # picture -> (kind, place in the list of its kind)
        for kind, items in ((VIT, planned.vit_items), (VAE, planned.vae_items)):
            for place, item in enumerate(items):
                wanted.setdefault(parts[item].image.number, []).append((kind, place))
        pixels = {VIT: [None] * len(planned.vit_items), VAE: [None] * len(planned.vae_items)}
        pictures = {part.image.number: part.image for part in parts if part.image is not None}
        for number, uses in wanted.items():
            image = None
            for kind, place in uses:
                height, width = sizes[kind][place]
                found = self._stored(group_index, planned.key[1], number, kind, (height, width))
                if found is None:
                    if image is None:
                        image = decode(_content(pictures[number]), self.config.max_image_pixels)
                    self._check_unchanged(group_index, kind, image.size, (width, height), num_images)
                    found = resize(image, (width, height))
                pixels[kind][place] = found
        return replace(planned, vit_pixels=pixels[VIT], vae_pixels=pixels[VAE])

    def _lay_out(self, entries: list[Entry]) -> list[Part]:
        return lay_out(entries, visual_und=self.visual_und, visual_gen=self.visual_gen)

    def _item(self, part: Part, size: tuple[int, int] | None) -> Item:
        ids = self._ids(part.text) if part.kind == "text" else None
        return Item(part.kind, loss=part.loss, enable_cfg=part.enable_cfg, text_ids=ids, size=size)

    def _ids(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise DataFault("bad_row", f"a text is of type {type(text).__name__}, it must be a string")
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            raise DataFault("bad_row", f"a text is not valid Unicode ({error.reason} at {error.start})") from None
        most = self.config.max_num_tokens_per_sample
        if len(encoded) > most * MAX_BYTES_PER_TOKEN:
            if self.config.over_long != "truncate_text":
                message = f"a text of {len(encoded)} bytes, more than data.max_num_tokens_per_sample = {most} tokens"
                raise DataFault("over_long", message)
            text = encoded[: most * MAX_BYTES_PER_TOKEN].decode(errors="ignore")
        return self.tokenizer.encode(text) if self._cache is None else self._cache.encode(text, self.tokenizer)

    def _sizes(
        self, group_index: int, parts: list[Part], entries: list[Entry], row: int
    ) -> Iterator[tuple[int, int] | None]:
        """Height and width in pixels of each part that is a picture."""
        num_images = _num_sharing(parts, entries)
        known = self.known[group_index] if self.known else None
        opened: dict[int, tuple[int, int]] = {}
        for part in parts:
            if part.image is None:
                yield None
                continue
            number = part.image.number
            if number not in opened:
                size = (known.size(row, number) if known else None) or part.image.size
                opened[number] = size or header_size(_content(part.image), self.config.max_image_pixels)
            args = self._args(group_index, part.kind)
            width, height = target_size(*opened[number], args, num_images)
            yield height, width

    def _args(self, group_index: int, kind: str) -> ImageTransformArgs:
        group = self._groups[group_index]
        args = group.vit_args if kind == "vit_image" else group.vae_args
        if args is None:
            key = "vit_image_transform_args" if kind == "vit_image" else "another format with image_transform_args"
            raise DataFault("bad_row", f"has a picture used as {kind}, but its group says no size for it; set {key}")
        return args

    def _plan(self, sample: Sample, dropped: list[bool]) -> PlannedSample:
        try:
            return plan_sample(sample, self.geometry, dropped, seed=self.config.seed)
        except ValueError as error:
            raise DataFault("bad_row", str(error).removeprefix(f"{sample.origin}: ")) from None

    def _truncate(self, sample: Sample, dropped: list[bool], planned: PlannedSample) -> PlannedSample:
        """The same with the ends of its longest texts cut off until it fits."""
        texts = [i for i, item in enumerate(sample.items) if item.type == "text" and not dropped[i]]
        excess = planned.num_tokens - self.config.max_num_tokens_per_sample
        lengths = cut_lengths([len(sample.items[i].text_ids) for i in texts], excess)
        if lengths is None:
            return planned
        items = list(sample.items)
        for i, length in zip(texts, lengths, strict=True):
            items[i] = replace(items[i], text_ids=items[i].text_ids[:length])
        return self._plan(replace(sample, items=items), dropped)

    def _shrink(self, sample: Sample, dropped: list[bool], planned: PlannedSample) -> PlannedSample:
        """The same with the area of all its pictures halved until it fits."""
        for halvings in range(1, _MAX_HALVINGS):
            items = [
                item if item.size is None else replace(item, size=self._shrunk(item.type, item.size, halvings))
                for item in sample.items
            ]
            planned = self._plan(replace(sample, items=items), dropped)
            if planned.num_tokens <= self.config.max_num_tokens_per_sample:
                break
        return planned

    def _shrunk(self, kind: str, size: tuple[int, int], halvings: int) -> tuple[int, int]:
        return shrunk(*size, self.geometry.stride(kind), halvings)

    def _stored(self, group_index: int, row: int, number: int, kind: int, size: tuple[int, int]) -> np.ndarray | None:
        known = self.known[group_index] if self.known else None
        return known.lookup(row, number, _PICTURES[kind], size) if known else None

    def _check_unchanged(
        self, group_index: int, kind: int, found: tuple[int, int], planned: tuple[int, int], num_images: int
    ) -> None:
        """`found`: of the file now; `planned`: the size it was measured for. Widths and heights."""
        size = target_size(*found, self._args(group_index, _PICTURES[kind]), num_images)
        shrinks = range(_MAX_HALVINGS) if self.config.over_long == "shrink_image" else ()
        if size != planned and all(self._shrunk(_PICTURES[kind], size, n) != planned for n in shrinks):
            raise DataFault(
                "changed_image", f"image is {found[0]} x {found[1]} pixels, which is not what was measured before"
            )


def pixel_bytes(planned: PlannedSample, geometry: Geometry, known: Known | None = None) -> int:
    """Bytes of the sample's pictures once they are read, at most. `known`: of its group."""
    total = 0.0
    for kind, sizes in _pixel_sizes(planned, geometry).items():
        each = max(3.0, known.bytes_per_pixel(_PICTURES[kind]) if known else 0.0)
        total += each * sum(height * width for height, width in sizes)
    return math.ceil(total)


def _pixel_sizes(planned: PlannedSample, geometry: Geometry) -> dict[int, list[tuple[int, int]]]:
    """Heights and widths of the kept pictures of each kind, in order."""
    sizes: dict[int, list[tuple[int, int]]] = {VIT: [], VAE: []}
    for piece in planned.pieces:
        if piece.grid is not None:
            stride = geometry.stride(_PICTURES[piece.kind])
            sizes[piece.kind].append((piece.grid[0] * stride, piece.grid[1] * stride))
    return sizes


def _num_sharing(parts: list[Part], entries: list[Entry]) -> int:
    """How many pictures share one pixel budget: all of a document that generates none."""
    if any(part.kind == "vae_image" and part.loss for part in parts):
        return 1
    return max(1, sum(entry.image is not None for entry in entries))


def _content(image: ImageSource) -> bytes | str:
    content = image.path if image.content is None else image.content
    if not isinstance(content, bytes | str):
        raise DataFault(
            "bad_row", f"picture {image.number} is of type {type(content).__name__}, neither bytes nor path"
        )
    return content
