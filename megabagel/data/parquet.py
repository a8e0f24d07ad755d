"""Rows of many parquet files by number, a bounded number of row groups in memory.

Format only: which columns mean what is decided by the sources.
"""

import json
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megabagel.config.datasets import DatasetPaths
from megabagel.data.faults import DataError, DataFault, Fault

ROW_GROUPS_IN_MEMORY = 4  # per source and worker process; also the shuffle window


class ParquetRows:
    """Random access to the rows of all data sets of a group. `blocks` [row groups]: rows each."""

    def __init__(self, datasets: dict[str, DatasetPaths], columns: list[str], num_files: list[int] | None) -> None:
        """`num_files`: how many files of each data set are used, in name order; null: all.

        Raises DataError for a missing folder or info file; unreadable files become `faults`.
        """
        self.columns = columns
        self.faults: list[Fault] = []
        self._groups: list[tuple[str, int, int]] = []  # path, row group, first row's number in the file
        self.blocks: list[int] = []
        for i, (name, paths) in enumerate(datasets.items()):
            for path in _list_files(name, paths, self.faults)[: None if num_files is None else num_files[i]]:
                self._add_file(path)
        self._ends = list(accumulate(self.blocks))
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def _add_file(self, path: Path) -> None:
        try:
            with pq.ParquetFile(path) as file:
                metadata, present = file.metadata, set(file.schema_arrow.names)
        except (pa.ArrowException, OSError) as error:
            message = f"truncated or not a parquet file, all its rows are lost ({error})"
            self.faults.append(Fault("unreadable_parquet", str(path), message))
            return
        if missing := [column for column in self.columns if column not in present]:
            found = ", ".join(sorted(present))
            message = f"column {', '.join(missing)} is missing (found {found}), all its rows are lost"
            self.faults.append(Fault("missing_column", str(path), message))
            return
        first = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            self._groups.append((str(path), group, first))
            self.blocks.append(rows)
            first += rows

    def _locate(self, row: int) -> tuple[int, int]:
        block = bisect_right(self._ends, row)
        return block, row - (self._ends[block] - self.blocks[block])

    def origin(self, row: int) -> str:
        """File and row, for messages."""
        block, inside = self._locate(row)
        path, _, first = self._groups[block]
        return f"{path} row {first + inside}"

    def __getitem__(self, row: int) -> dict:
        """The row as Python objects. Raises DataFault when its row group cannot be read."""
        block, inside = self._locate(row)
        if block in self._cache:
            self._cache.move_to_end(block)
        else:
            path, group, _ = self._groups[block]
            while len(self._cache) >= ROW_GROUPS_IN_MEMORY:
                self._cache.popitem(last=False)
            try:
                with pq.ParquetFile(path) as file:
                    self._cache[block] = file.read_row_group(group, columns=self.columns, use_threads=False)
            except FileNotFoundError:
                raise DataFault("missing_file", "the file is gone since the run started") from None
            except (pa.ArrowException, OSError) as error:
                raise DataFault("unreadable_parquet", f"row group {group} cannot be read ({error})") from None
        return self._cache[block].slice(inside, 1).to_pylist()[0]


def _list_files(name: str, paths: DatasetPaths, faults: list[Fault]) -> list[Path]:
    """All parquet files of a data set's folder in name order, compared with its info file where there is one."""
    folder = Path(paths.data_dir)
    if not folder.is_dir():
        raise DataError(f"data set {name}: folder data_dir {folder} does not exist.")
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(f"data set {name}: folder data_dir {folder} holds no *.parquet file.")
    info = paths.parquet_info_path
    if info is None:
        return files
    try:
        listed = {Path(path).name for path in json.loads(Path(info).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"data set {name}: parquet_info_path {info} cannot be read: {error}.") from None
    for path in files:
        if path.name not in listed:
            faults.append(Fault("unlisted_parquet", str(path), f"not listed in {info}; it is read all the same"))
    for missing in sorted(listed - {path.name for path in files}):
        faults.append(Fault("missing_file", str(folder / missing), f"listed in {info} but not there"))
    return files
