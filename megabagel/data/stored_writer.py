"""Writes what `stored.py` reads: parts of consecutive rows, a safetensors shard and its parquet index each.

What is written can be trusted to be whole: every file appears under its name in one step, an index after its shard.
"""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file
from torch import Tensor

from megabagel.data.faults import DataError, Fault
from megabagel.data.stored import (
    HEADER,
    INDEX_SUFFIX,
    SHARD_SUFFIX,
    Header,
    finished,
    part_name,
    read_header,
    tensor_name,
)

SECONDS_PER_PART = 600.0  # what a killed process loses at most
_TEMPORARY = ".unfinished"
_FAULTS = b"faults"  # key of the index's metadata
_SCHEMA = pa.schema(
    [
        ("group", pa.string()),
        ("row", pa.int64()),
        ("number", pa.int32()),  # among the pictures of the row
        ("kind", pa.string()),
        ("height", pa.int32()),  # after resizing
        ("width", pa.int32()),
        ("picture_height", pa.int32()),  # before
        ("picture_width", pa.int32()),
        ("shard", pa.string()),
        ("tensor", pa.string()),
    ]
)


def prepare_folder(folder: Path, header: Header) -> None:
    """Make the folder of one kind ready to be written to, or written on.

    Raises DataError when it already holds pictures that were stored with another header.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = read_header(folder)
    if found is not None and found != header:
        differing = [name for name, value in asdict(header).items() if asdict(found)[name] != value]
        raise DataError(
            f"{folder} was begun with another {' and '.join(differing)}; give another --out or delete that folder."
        )
    whole = {part_name(*rows) for rows in finished(folder)}
    for file in folder.iterdir():  # what a run that was killed left behind
        if file.name.endswith(_TEMPORARY) or (file.suffix == SHARD_SUFFIX and file.stem not in whole):
            file.unlink()
    if found is None:
        _write_text(folder / HEADER, json.dumps(asdict(header), indent=1))


class PartWriter:
    """Collects the pictures of consecutive rows, from row `first` on, and writes them part by part."""

    def __init__(self, folder: Path, group: str, kind: str, first: int, shard_bytes: int) -> None:
        """A part is closed behind the row that brings its shard to `shard_bytes`."""
        self._folder, self._group, self._kind, self._limit = folder, group, kind, shard_bytes
        self._start(first)

    def _start(self, first: int) -> None:
        self._first, self._bytes, self._begun = first, 0, time.monotonic()
        self._entries: list[dict] = []
        self._tensors: dict[str, Tensor] = {}
        self._faults: list[dict] = []

    def add(self, row: int, number: int, picture: tuple[int, int], target: tuple[int, int], values: Tensor) -> None:
        """`picture`: height and width before resizing; `target`: after. A size that is there already is passed over."""
        name = tensor_name(row, number, target)
        if name in self._tensors:
            return
        self._tensors[name] = values.contiguous()
        self._bytes += values.nbytes
        sizes = dict(zip(("height", "width", "picture_height", "picture_width"), (*target, *picture), strict=True))
        entry = {"group": self._group, "row": row, "number": number, "kind": self._kind, "tensor": name}
        self._entries.append(entry | sizes)

    def bad(self, row: int, fault: Fault) -> None:
        """Note that the row cannot be used."""
        what = {"kind": fault.kind, "origin": fault.origin, "message": fault.message}
        self._faults.append({"group": self._group, "row": row, **what})

    def end_row(self, row: int) -> None:
        """All pictures of the row are in."""
        if self._bytes >= self._limit or time.monotonic() - self._begun > SECONDS_PER_PART:
            self.close(row + 1)

    def close(self, stop: int) -> None:
        """Write what is left of the rows before `stop`, which are finished; forget what came of others."""
        if stop <= self._first:
            return
        name = part_name(self._first, stop)
        shard = name + SHARD_SUFFIX
        entries = [entry | {"shard": shard} for entry in self._entries if entry["row"] < stop]
        faults = [fault for fault in self._faults if fault["row"] < stop]
        if entries:
            file = self._folder / (shard + _TEMPORARY)
            save_file({entry["tensor"]: self._tensors[entry["tensor"]] for entry in entries}, file)
            os.replace(file, self._folder / shard)
        table = pa.Table.from_pylist(entries, _SCHEMA).replace_schema_metadata({_FAULTS: json.dumps(faults)})
        file = self._folder / (name + INDEX_SUFFIX + _TEMPORARY)
        pq.write_table(table, file)
        os.replace(file, self._folder / (name + INDEX_SUFFIX))
        self._start(stop)


def faults_in(folder: Path) -> list[dict]:
    """Rows of all parts that could not be used: group, row, kind, origin, message."""
    return [fault for file in _indexes(folder) for fault in json.loads(pq.read_schema(file).metadata[_FAULTS])]


def count_pictures(folder: Path) -> int:
    """Stored pictures in the folder of a kind."""
    return sum(pq.read_metadata(file).num_rows for file in _indexes(folder))


def _indexes(folder: Path) -> list[Path]:
    return [folder / (part_name(*rows) + INDEX_SUFFIX) for rows in finished(folder)]


def write_faults(file: Path, faults: list[dict]) -> None:
    """One JSON object a line."""
    _write_text(file, "".join(json.dumps(fault) + "\n" for fault in faults))


def _write_text(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + _TEMPORARY)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
