"""Pictures that were encoded before: moments of the autoencoder and features of a frozen ViT, beside the data.

`tools/encode_latents.py` writes them with `stored_writer.py`; this is the layout of the folder and how it is read.
Which weights made them is compared in `training/stored.py`.
"""

import json
import logging
import os
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from megabagel.config.datasets import EDIT, FILE_SUFFIXES, T2I, DatasetPaths, GroupConfig, is_url
from megabagel.data.faults import DataError, DataFault
from megabagel.data.files.storage import list_files

logger = logging.getLogger(__name__)

Kind = Literal["vae_image", "vit_image"]
KINDS: tuple[Kind, ...] = ("vae_image", "vit_image")
VERSION = 1
HEADER = "header.json"
INDEX_SUFFIX, SHARD_SUFFIX = ".parquet", ".safetensors"
INDEXES_IN_MEMORY, SHARDS_OPEN = 1024, 64
_NUMBERS = ("row", "number", "height", "width", "picture_height", "picture_width")
_REMEDY = "encode the group anew with tools/encode_latents.py into an empty folder, or remove latents_dir"


@dataclass(frozen=True)
class Header:
    """What all pictures of one kind in a folder have in common: `header.json`."""

    kind: str
    encoder: str  # fingerprint of its weights
    dtype: str  # of the stored numbers: fp32 or bf16
    transform: dict[str, int]  # the image_transform_args that gave the target sizes
    rows: dict[str, Any]  # which rows of which files: see `rows_of`
    version: int = VERSION


def rows_of(group: GroupConfig) -> dict[str, Any]:
    """What decides which picture a row number stands for: files with sizes and times, and how rows are chosen."""
    suffixes = (".parquet",) if group.format in (T2I, EDIT) else FILE_SUFFIXES
    return {
        "files": {name: _files(paths, suffixes) for name, paths in group.datasets.items()},
        "num_used_data": group.num_used_data,
        "shuffle": group.shuffle_seed if group.shuffle_lines else None,
    }


def _files(paths: DatasetPaths, suffixes: tuple[str, ...]) -> dict[str, list[int]]:
    """File -> [bytes, seconds of its last change]; of what lies at a URL only the names are known."""
    found = {}
    for file in list_files(paths.path, suffixes):
        if is_url(file):
            found[file.removeprefix(paths.data_dir).lstrip("/")] = [0, 0]
        else:
            stat = os.stat(file)
            found[os.path.relpath(file, paths.data_dir)] = [stat.st_size, int(stat.st_mtime)]
    return found


def part_name(first: int, stop: int) -> str:
    """Stem of the files that hold rows first to stop - 1."""
    return f"{first:010d}-{stop:010d}"


def tensor_name(row: int, number: int, size: tuple[int, int]) -> str:
    """In a shard; `size`: height and width after resizing."""
    return f"{row}.{number}.{size[0]}x{size[1]}"


def finished(folder: Path) -> list[tuple[int, int]]:
    """First row and end of each part in the folder of a kind, in order: an index is written last."""
    names = [name for name in os.listdir(folder) if name.endswith(INDEX_SUFFIX)] if folder.is_dir() else []
    return sorted(tuple(int(n) for n in name.removesuffix(INDEX_SUFFIX).split("-")) for name in names)


def read_header(folder: Path) -> Header | None:
    """None where the folder holds none. Raises DataError for one that cannot be read."""
    file = folder / HEADER
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        header = Header(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} is not a header of stored pictures ({error}); {_REMEDY}.") from None
    if header.version != VERSION:
        raise DataError(f"{file} has version {header.version}, this program reads version {VERSION}; {_REMEDY}.")
    return header


class Store:
    """Stored pictures of one kind, random access. Handles stay in the process that opened them."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder, self.header = folder, header
        self._parts = finished(folder)
        self._firsts = [first for first, _ in self._parts]
        self._forget()

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("_indexes", "_shards")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        self._indexes: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._shards: OrderedDict[int, Any] = OrderedDict()

    def bytes_per_pixel(self) -> float:
        """Of the first picture; the others of a kind take as much. 0 where nothing is stored or can be read."""
        if not self._parts:
            return 0.0
        file = self.folder / (part_name(*self._parts[0]) + SHARD_SUFFIX)
        try:
            with safe_open(file, framework="pt") as shard:
                name = next(iter(shard.keys()))
                height, width = (int(side) for side in name.rpartition(".")[2].split("x"))
                return shard.get_tensor(name).nbytes / (height * width)
        except (OSError, SafetensorError, StopIteration):
            return 0.0

    def size(self, row: int, number: int) -> tuple[int, int] | None:
        """Width and height of the upright picture before it was resized."""
        for part, place in self._places(row, number):
            index = self._indexes[part]
            return int(index["picture_width"][place]), int(index["picture_height"][place])
        return None

    def read(self, row: int, number: int, size: tuple[int, int]) -> np.ndarray | None:
        """float32 or bfloat16's bits as int16; None where the picture is not stored at that size.

        Raises DataFault for a damaged file.
        """
        for part, place in self._places(row, number):
            index = self._indexes[part]
            if (index["height"][place], index["width"][place]) == size:
                return self._tensor(part, tensor_name(row, number, size))
        return None

    def _places(self, row: int, number: int) -> list[tuple[int, int]]:
        """(part, place in its index) of the picture, once for every size it is stored at."""
        part = bisect_right(self._firsts, row) - 1
        if part < 0 or row >= self._parts[part][1]:
            return []
        index = self._index(part)
        start, stop = np.searchsorted(index["row"], [row, row + 1])
        return [(part, place) for place in range(start, stop) if index["number"][place] == number]

    def _index(self, part: int) -> dict[str, np.ndarray]:
        if part not in self._indexes:
            file = self.folder / (part_name(*self._parts[part]) + INDEX_SUFFIX)
            try:
                table = pq.read_table(file, columns=list(_NUMBERS))
            except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
                raise DataFault("stored_picture", f"index {file} cannot be read ({error}); {_REMEDY}") from None
            self._indexes[part] = {name: table.column(name).to_numpy() for name in _NUMBERS}
            if len(self._indexes) > INDEXES_IN_MEMORY:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(part)
        return self._indexes[part]

    def _tensor(self, part: int, name: str) -> np.ndarray:
        file = self.folder / (part_name(*self._parts[part]) + SHARD_SUFFIX)
        try:
            if part not in self._shards:
                self._shards[part] = safe_open(file, framework="pt")
                if len(self._shards) > SHARDS_OPEN:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(part)
            tensor = self._shards[part].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise DataFault("stored_picture", f"{file} cannot be read ({error}); {_REMEDY}") from None
        return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class StoredLatents:
    """What is stored of a group's pictures; a picture is addressed by its row and its number in the row."""

    def __init__(self, stores: dict[Kind, Store]) -> None:
        self._stores = stores
        self._bytes_per_pixel = {kind: store.bytes_per_pixel() for kind, store in stores.items()}

    def bytes_per_pixel(self, kind: Kind) -> float:
        """What a stored picture takes in memory, by the pixels it stands for; 0: none are stored."""
        return self._bytes_per_pixel.get(kind, 0.0)

    @classmethod
    def open(cls, group: GroupConfig, *, features: bool) -> "StoredLatents | None":
        """What is at `group.latents_dir`; None where that is not set. `features`: those of the ViT are used too, which
        must then be frozen.

        Raises DataError when nothing is there, or was made of other files or with other image sizes.
        """
        if group.latents_dir is None:
            return None
        found = stored_kinds(group.latents_dir)
        if not found:
            raise DataError(f"latents_dir {group.latents_dir} holds no stored pictures; {_REMEDY}.")
        stores = {kind: Store(folder, header) for kind, folder, header in found if features or kind == "vae_image"}
        for kind, store in stores.items():
            _compare(group, kind, store)
        return cls(stores)

    def size(self, row: int, number: int) -> tuple[int, int] | None:
        """Width and height of a picture, upright and before it is resized; None where nothing of it is stored."""
        return next((size for store in self._stores.values() if (size := store.size(row, number))), None)

    def lookup(self, row: int, number: int, kind: Kind, size: tuple[int, int]) -> np.ndarray | None:
        """The picture at `size` (height, width) after resizing: moments [2z, h, w] or features [n, hidden], float32, or
        the bits of bfloat16 as int16.

        None where it is not stored at that size. Raises DataFault when it is and cannot be read.
        """
        return self._stores[kind].read(row, number, size) if kind in self._stores else None


def stored_kinds(folder: str | Path) -> list[tuple[Kind, Path, Header]]:
    """Kinds of pictures that are stored below `folder`, where they are, and their headers."""
    found = [(kind, Path(folder) / kind) for kind in KINDS]
    return [(kind, place, header) for kind, place in found if (header := read_header(place)) is not None]


def _compare(group: GroupConfig, kind: Kind, store: Store) -> None:
    """Raises DataError when the store belongs to other files or sizes; warns when files were only touched."""
    args = group.vae_args if kind == "vae_image" else group.vit_args
    wanted, header = asdict(args) if args else None, store.header
    if wanted is not None and wanted != header.transform:
        differing = sorted(key for key in wanted if wanted[key] != header.transform.get(key))
        now, then = ({key: sizes.get(key) for key in differing} for sizes in (wanted, header.transform))
        raise DataError(f"{store.folder} was stored with image sizes {then}, the group now has {now}; {_REMEDY}.")
    here, there = rows_of(group), header.rows
    if _without_times(here) != _without_times(there):
        raise DataError(f"{store.folder} was stored from other files or another choice of rows; {_REMEDY}.")
    if here != there:
        logger.warning("%s: data files were touched since; if their rows changed, %s", store.folder, _REMEDY)


def _without_times(rows: dict[str, Any]) -> dict[str, Any]:
    sizes = {name: {file: size for file, (size, _) in files.items()} for name, files in rows["files"].items()}
    return {**rows, "files": sizes}
