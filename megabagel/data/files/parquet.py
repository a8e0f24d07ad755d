"""Rows of a parquet file by number, a bounded number of row groups in memory.

Which columns mean what is decided by formats; which files belong to a data set, by `files/__init__.py`.
"""

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from megabagel.data.faults import DataFault, Fault
from megabagel.data.files import storage
from megabagel.data.files.index import Index, Places

WINDOW = 4  # row groups that are shuffled together
ROW_GROUPS_IN_MEMORY = 2 * WINDOW  # per group and process: measuring runs ahead of reading, each in a window of its own

Cache = OrderedDict[tuple[str, int], pa.Table]  # row groups by path and number, the latest last; one for all files


class Parquet:
    """Random access to the rows of one file. `blocks` [row groups]: rows each."""

    def __init__(
        self, path: str, columns: list[str] | None, required: list[str], cache: Cache, index: Index | None = None
    ) -> None:
        """`columns`: read where present; null: all. Without those of `required`, without any of `columns`, or
        unreadable, the file has no rows and one fault."""
        self.path = path
        self.blocks: list[int] = []
        self.faults: list[Fault] = []
        self.index = index
        self._columns, self._cache = columns, cache
        try:
            layout = scan(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            message = f"truncated or not a parquet file, all its rows are lost ({error})"
            self.faults.append(Fault("unreadable_parquet", path, message))
        else:
            if lack := _lack(layout.columns, columns, required):
                found = ", ".join(sorted(layout.columns))
                self.faults.append(Fault("missing_column", path, f"{lack} (found {found}), all its rows are lost"))
            else:
                self.blocks = layout.row_groups
        self._ends = list(accumulate(self.blocks))
        self.num_rows = sum(self.blocks)

    def label(self, row: int) -> str:
        """The row's number in the file from 0, for messages."""
        return f"row {row}"

    def places(self) -> Places:
        """The number of rows, for an index: the file's own footer says where they are."""
        return Places.nowhere(self.num_rows)

    def __getitem__(self, row: int) -> dict:
        """The row as Python objects. Raises DataFault when its row group cannot be read."""
        group = bisect_right(self._ends, row)
        inside = row - (self._ends[group] - self.blocks[group])
        key = (self.path, group)
        if key in self._cache:
            self._cache.move_to_end(key)
        else:
            while len(self._cache) >= ROW_GROUPS_IN_MEMORY:
                self._cache.popitem(last=False)
            self._cache[key] = self._read(group)
        try:
            return self._cache[key].slice(inside, 1).to_pylist()[0]
        except (pa.ArrowException, ValueError) as error:  # text that is not UTF-8
            raise DataFault("unreadable_parquet", f"the row cannot be read ({error})") from None

    def _read(self, group: int) -> pa.Table:
        try:
            with storage.open_binary(self.path) as content, pq.ParquetFile(content) as file:
                columns = self._columns and [name for name in self._columns if name in file.schema_arrow.names]
                return file.read_row_group(group, columns=columns, use_threads=False)
        except FileNotFoundError:
            raise DataFault("missing_file", "the file is gone since the run started") from None
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataFault("unreadable_parquet", f"row group {group} cannot be read ({error})") from None


def _lack(present: list[str], columns: list[str] | None, required: list[str]) -> str:
    """What keeps a file with the columns `present` from being used, or nothing."""
    if missing := [column for column in required if column not in present]:
        return f"column {', '.join(missing)} is missing"
    if columns is not None and not set(columns) & set(present):
        return f"none of the columns {', '.join(columns)} is there"
    return ""


@dataclass
class Layout:
    """What a file's footer says."""

    row_groups: list[int]  # rows each
    columns: list[str]


def scan(path: str) -> Layout:
    """Read the footer. Raises OSError, ValueError or ArrowException when it cannot be read."""
    with storage.open_binary(path) as content, pq.ParquetFile(content) as file:
        rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        if min(rows, default=0) < 0:
            raise ValueError("a row group states a negative number of rows")
        return Layout(rows, list(file.schema_arrow.names))
