"""Rows of a group's files by number, whatever kind of file they are: row number -> dict.

What the keys of a row mean is decided in `data/sources`.
"""

import json
import logging
from bisect import bisect_right
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from megabagel.config.datasets import EDIT, FILE_SUFFIXES, T2I, DatasetPaths, GroupConfig
from megabagel.data.faults import DataError, Fault
from megabagel.data.files import storage
from megabagel.data.files.index import SUFFIX as INDEX_SUFFIX
from megabagel.data.files.index import Index, Places, open_index
from megabagel.data.files.json_array import JsonArray
from megabagel.data.files.jsonl import JsonLines
from megabagel.data.files.parquet import WINDOW, Cache, Parquet
from megabagel.data.files.webdataset import Tar
from megabagel.runtime import rng

logger = logging.getLogger(__name__)

_OPENED_AT_ONCE = 8  # files: where each takes a round trip over a network
_BLOCK = 256  # rows in place of a whole file where other files of the group are parquet


class File(Protocol):
    """Random access to the rows of one file."""

    path: str
    num_rows: int
    blocks: list[int] | None  # rows that are cheap to read together; null: every row by itself
    faults: list[Fault]
    index: Index | None

    def label(self, row: int) -> str: ...

    def places(self) -> Places: ...

    def __getitem__(self, row: int) -> dict: ...


class Rows:
    """Random access to the used rows of all data sets of a group.

    `blocks`: numbers of rows that are cheap to read together. `window`: how many blocks are shuffled together; null:
    all. `faults`: of whole files, found while opening. `files`: all of them, in order.
    """

    def __init__(self, datasets: list["_Dataset"], cache: Cache) -> None:
        self.faults = [fault for dataset in datasets for fault in dataset.faults]
        in_blocks = any(dataset.blocks is not None for dataset in datasets)
        self.window = WINDOW if in_blocks else None
        self.blocks: list[int] = []
        for dataset in datasets:
            if dataset.blocks is not None:
                self.blocks += dataset.blocks
            elif in_blocks:
                full, rest = divmod(dataset.num_rows, _BLOCK)
                self.blocks += [_BLOCK] * full + [rest] * (rest > 0)
            else:
                self.blocks.append(dataset.num_rows)
        self.files = [file for dataset in datasets for file in dataset.files]
        self._datasets, self._cache = datasets, cache
        self._ends = list(accumulate(dataset.num_rows for dataset in datasets))

    def _locate(self, row: int) -> tuple["_Dataset", int]:
        i = bisect_right(self._ends, row)
        return self._datasets[i], row - (self._ends[i] - self._datasets[i].num_rows)

    def origin(self, row: int) -> str:
        """File and row in it, for messages."""
        dataset, inside = self._locate(row)
        file, number = dataset.locate(inside)
        return f"{file.path} {file.label(number)}"

    def folder(self, row: int) -> str:
        """Folder or URL that the row's picture names are relative to."""
        return self._locate(row)[0].folder

    def sizes(self, row: int) -> list[tuple[int, int] | None]:
        """Width and height of the row's pictures by their number, as far as an index tells them."""
        dataset, inside = self._locate(row)
        file, number = dataset.locate(inside)
        return [] if file.index is None else file.index.sizes(number)

    def __getitem__(self, row: int) -> dict:
        """The row. Raises DataFault when it cannot be read."""
        dataset, inside = self._locate(row)
        file, number = dataset.locate(inside)
        return file[number]


def open_rows(group: GroupConfig, columns: list[str] | None = None, required: list[str] | None = None) -> Rows:
    """Open all files of `group`. `columns`: of parquet files, read where present, null: all; `required`: those without
    which a parquet file is of no use. Raises DataError for missing files, folders and mixed kinds of files."""
    cache: Cache = OrderedDict()
    datasets = []
    stale: list[str] = []
    for i, (name, paths) in enumerate(group.datasets.items()):
        faults: list[Fault] = []
        found, kind = list_data_files(name, paths, group.format, faults)
        opener = partial(
            _open, kind=kind, columns=columns, required=required or [], cache=cache, group=group, stale=stale
        )
        with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
            files = list(pool.map(opener, found))
        used = None if group.num_used_data is None else group.num_used_data[i]
        order = rng.generator(group.shuffle_seed, "line_choice", (i,)) if group.shuffle_lines else None
        datasets.append(_Dataset(files, paths.data_dir or "", faults, used, order))
    if stale:
        logger.warning(
            "%d of the data's indexes are damaged or older than their files and not used, for example %s; "
            "run tools/index_data.py again",
            len(stale),
            min(stale),
        )
    return Rows(datasets, cache)


def _open(
    path: str,
    kind: str,
    columns: list[str] | None,
    required: list[str],
    cache: Cache,
    group: GroupConfig,
    stale: list[str],
) -> File:
    index = open_index(path, group.index_dir, group.format, stale)
    if kind == ".parquet":
        return Parquet(path, columns, required, cache, index)
    return {".jsonl": JsonLines, ".json": JsonArray, ".tar": Tar}[kind](path, index)


class _Dataset:
    """The used rows of the files of one data set, all of one kind."""

    def __init__(
        self, files: list[File], folder: str, faults: list[Fault], used: int | None, order: np.random.Generator | None
    ) -> None:
        """`used`: how many files (parquet) or rows; null: all. `order` decides which rows are used, not when."""
        in_blocks = files[0].blocks is not None
        self.files = files[:used] if in_blocks else files
        self.folder = folder
        self.faults = faults + [fault for file in self.files for fault in file.faults]
        self._ends = list(accumulate(file.num_rows for file in self.files))
        self.num_rows = self._ends[-1]
        self.blocks: list[int] | None = None
        self._chosen: np.ndarray | None = None  # [used] numbers of rows
        if in_blocks:
            self.blocks = [rows for file in self.files for rows in file.blocks]
            return
        if order is not None:
            self._chosen = order.permutation(self.num_rows)[:used]
        if used is not None:
            self.num_rows = min(used, self.num_rows)

    def locate(self, row: int) -> tuple[File, int]:
        row = row if self._chosen is None else int(self._chosen[row])
        i = bisect_right(self._ends, row)
        return self.files[i], row - (self._ends[i] - self.files[i].num_rows)


def list_data_files(name: str, paths: DatasetPaths, format: str, faults: list[Fault]) -> tuple[list[str], str]:
    """The files of a data set in name order, at least one, compared with the info file, and their common suffix."""
    where = paths.path or paths.jsonl_path or paths.data_dir
    settings = ("jsonl_path", "data_dir", "path")  # `path` repeats one of the others where it was not given
    setting = next(setting for setting in settings if getattr(paths, setting) == where)
    # the official folders may hold more than their rows
    official = format in (T2I, EDIT) and setting == "data_dir"
    suffixes = (".parquet",) if official else FILE_SUFFIXES
    try:
        files = [
            file
            for file in storage.list_files(where, suffixes)
            if file != paths.parquet_info_path and not file.endswith(INDEX_SUFFIX)
        ]
    except OSError as error:
        raise DataError(f"data set {name}: {setting} {where} cannot be read ({error}).") from None
    if not files:
        raise DataError(f"data set {name}: {_nothing_at(where, setting, suffixes)}.")
    if files == [paths.jsonl_path]:  # whatever it is called
        return files, ".jsonl"
    kinds = {storage.suffix(file) for file in files}
    if len(kinds) > 1:
        raise DataError(
            f"data set {name}: {setting} {where} holds {', '.join(sorted(kinds))} files; name the ones to read with "
            f"a pattern, for example {where.rstrip('/')}/*{min(kinds)}."
        )
    if not kinds <= set(FILE_SUFFIXES):
        raise DataError(
            f"data set {name}: {setting} {where} must be one of {', '.join(FILE_SUFFIXES)}, or a folder of them."
        )
    if paths.parquet_info_path is not None:
        _compare(name, paths.parquet_info_path, where, files, faults)
    return files, kinds.pop()


def _nothing_at(where: str, setting: str, suffixes: tuple[str, ...]) -> str:
    if "*" in where:
        return f"no {', '.join(suffixes)} file matches {setting} {where}"
    if not storage.is_folder(where):
        kind = "file" if storage.suffix(where) in FILE_SUFFIXES else "folder"
        return f"{kind} {setting} {where} does not exist"
    return f"folder {setting} {where} holds no {', '.join('*' + suffix for suffix in suffixes)} file"


def _compare(name: str, info: str, where: str, files: list[str], faults: list[Fault]) -> None:
    """Add a fault for every file that the info file {path: {"num_row_groups": n}} lists and is not there, or the
    reverse."""
    try:
        listed = {Path(path).name for path in json.loads(storage.read(info))}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"data set {name}: parquet_info_path {info} cannot be read: {error}.") from None
    for file in files:
        if Path(file).name not in listed:
            faults.append(Fault("unlisted_parquet", file, f"not listed in {info}; it is read all the same"))
    for missing in sorted(listed - {Path(file).name for file in files}):
        faults.append(Fault("missing_file", f"{where.rstrip('/')}/{missing}", f"listed in {info} but not there"))
