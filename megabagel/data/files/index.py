"""The small file beside a data file that says where its rows lie, how long their texts, how large their pictures are.

With it a large or remote file is opened without being read through, and pictures are measured without being opened. It
is a hint: one that does not belong to the file any more is left alone. `tools/index_data.py` writes it.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megabagel.data.faults import DataError, Fault
from megabagel.data.files import storage

SUFFIX = ".index.parquet"
VERSION = 1
_HEADER = b"megabagel.index"
_SCHEMA = pa.schema(
    {
        "name": pa.string(),  # of a tar file's sample
        "line": pa.int64(),  # of a jsonl file's row, from 1
        "begin": pa.list_(pa.int64()),  # bytes of the row, or of each of its members
        "end": pa.list_(pa.int64()),
        "ending": pa.list_(pa.string()),  # of each member
        "tokens": pa.list_(pa.int32()),  # of each text that its first visit shows
        "width": pa.list_(pa.int32()),  # of each picture upright, by its number in the row; 0: not known
        "height": pa.list_(pa.int32()),
        "fault": pa.string(),  # kind, null: the row can be used
        "message": pa.string(),
    }
)

_READ = ["name", "line", "begin", "end", "ending", "width", "height"]  # by a run; the rest is for people and tools


@dataclass(frozen=True)
class Header:
    """What an index was made of. `stamp`: bytes and last change of the data file."""

    stamp: tuple[int, str]
    format: str  # which decides how texts and pictures are numbered
    tokenizer: str  # fingerprint
    faults: list[list[str]] = field(default_factory=list)  # kind, origin and message, of the file as a whole
    version: int = VERSION


@dataclass
class Places:
    """Where the rows of a file lie. Parquet files know it themselves: then there are no spans."""

    spans: np.ndarray  # int64 [members, 2] begin and end, bytes
    starts: np.ndarray  # int64 [rows + 1] into spans
    lines: np.ndarray | None = None  # int64 [rows] jsonl: line numbers from 1
    names: list[str] | None = None  # [rows] tar: names of the samples
    endings: list[str] | None = None  # [members] tar

    @classmethod
    def nowhere(cls, rows: int) -> "Places":
        return cls(np.zeros((0, 2), np.int64), np.zeros(rows + 1, np.int64))

    @classmethod
    def one_each(cls, spans: np.ndarray, lines: np.ndarray | None = None) -> "Places":
        """`spans` [rows, 2]."""
        return cls(spans, np.arange(len(spans) + 1), lines)


@dataclass
class RowFacts:
    """What is known of a row's content."""

    tokens: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width and height; (0, 0): not known
    fault: Fault | None = None


@dataclass
class Index:
    """An index in memory."""

    header: Header
    places: Places
    _size_starts: np.ndarray  # int64 [rows + 1]
    _sizes: np.ndarray  # int32 [pictures, 2] width and height

    @property
    def faults(self) -> list[Fault]:
        """Of the file as a whole."""
        return [Fault(*fault) for fault in self.header.faults]

    def sizes(self, row: int) -> list[tuple[int, int] | None]:
        """Width and height of the row's pictures, upright, by their number; None where not known."""
        if row + 1 >= len(self._size_starts):
            return []
        found = self._sizes[self._size_starts[row] : self._size_starts[row + 1]].tolist()
        return [(width, height) if width and height else None for width, height in found]


def path_of(data_file: str, folder: str | None) -> str:
    """Where the index of a data file is: beside it, or in `folder`."""
    if folder is None:
        return data_file + SUFFIX
    name = data_file.rpartition("/")[2]
    return f"{folder.rstrip('/')}/{name}.{hashlib.blake2b(data_file.encode(), digest_size=4).hexdigest()}{SUFFIX}"


def read_header(path: str) -> Header | None:
    """None where there is no index, or none that this program can read."""
    try:
        if not storage.is_file(path):
            return None
        with storage.open_binary(path) as content:
            metadata = pq.read_schema(content).metadata or {}
        values = json.loads(metadata[_HEADER])
        header = Header(**{**values, "stamp": tuple(values["stamp"])})
    except (OSError, KeyError, TypeError, ValueError):  # pyarrow's errors are ValueErrors
        return None
    return header if header.version == VERSION else None


def open_index(data_file: str, folder: str | None, format: str, stale: list[str]) -> Index | None:
    """The index of a data file, None where there is none that can be used; one that is out of date is added to
    `stale`. Where it was made for another format, only the places of the rows are taken from it."""
    path = path_of(data_file, folder)
    try:
        if not storage.is_file(path):
            return None
        header = read_header(path)
        if header is None or header.stamp != storage.stamp(data_file):
            stale.append(path)
            return None
        with storage.open_binary(path) as content:
            table = pq.read_table(content, columns=_READ, page_checksum_verification=True)
    except (OSError, ValueError):
        stale.append(path)
        return None
    starts, begins = _lists(table, "begin")
    lines, names = table["line"], table["name"]
    in_tar = names.null_count == 0 and storage.suffix(data_file) == ".tar"
    places = Places(
        np.stack([begins, _lists(table, "end")[1]], axis=1),
        starts,
        None if lines.null_count else lines.to_numpy(),
        names.to_pylist() if in_tar else None,
        [sys.intern(ending) for ending in pc.list_flatten(table["ending"]).to_pylist()] if in_tar else None,
    )
    size_starts, widths = _lists(table, "width")
    sizes = np.stack([widths, _lists(table, "height")[1]], axis=1)
    if header.format != format:
        size_starts, sizes = np.zeros_like(size_starts), sizes[:0]
    return Index(header, places, size_starts, sizes)


def write_index(path: str, header: Header, places: Places, rows: Sequence[RowFacts]) -> None:
    """Write an index at once or not at all, to a local path. Raises DataError where that is not possible."""
    count = len(places.starts) - 1
    if len(rows) != count:
        raise ValueError(f"{len(rows)} rows are described, the file has {count}")
    members = [slice(*places.starts[i : i + 2].tolist()) for i in range(count)]
    columns = {
        "name": places.names or [None] * count,
        "line": [None] * count if places.lines is None else places.lines,
        "begin": [places.spans[inside, 0] for inside in members],
        "end": [places.spans[inside, 1] for inside in members],
        "ending": [None if places.endings is None else places.endings[inside] for inside in members],
        "tokens": [row.tokens for row in rows],
        "width": [[width for width, _ in row.sizes] for row in rows],
        "height": [[height for _, height in row.sizes] for row in rows],
        "fault": [row.fault and row.fault.kind for row in rows],
        "message": [row.fault and row.fault.message for row in rows],
    }
    table = pa.table(columns, schema=_SCHEMA.with_metadata({_HEADER: json.dumps(asdict(header)).encode()}))
    part = f"{path}.part"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, part, compression="zstd", write_page_checksum=True)
        os.replace(part, path)
    except OSError as error:
        raise DataError(
            f"index {path} cannot be written ({error.strerror or error}); give a folder for the indexes with --out."
        ) from None


def _lists(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """First places [rows + 1] and values of a column of lists."""
    lengths = pc.list_value_length(table[name]).to_numpy()
    values = pc.list_flatten(table[name]).to_numpy()
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), values
