"""JSON objects, one per line, by number, through an index of line offsets. What the keys mean is decided by formats."""

import json

import numpy as np

from megabagel.data.faults import DataError, DataFault, Fault
from megabagel.data.files import storage
from megabagel.data.files.index import Index, Places

_CHUNK = 1 << 24


class JsonLines:
    """Random access to the lines of one file that are not blank."""

    def __init__(self, path: str, index: Index | None = None) -> None:
        """Raises DataError when the file cannot be read."""
        self.path = path
        self.blocks: list[int] | None = None  # lines are read one by one
        self.faults: list[Fault] = []
        self.index = index
        self._spans = scan(path) if index is None else np.column_stack([index.places.spans, index.places.lines])
        self.num_rows = len(self._spans)

    def label(self, row: int) -> str:
        """The line's number from 1, for messages."""
        return f"line {self._spans[row, 2]}"

    def places(self) -> Places:
        """Where the rows lie, for an index."""
        return Places.one_each(self._spans[:, :2], self._spans[:, 2])

    def __getitem__(self, row: int) -> dict:
        """The parsed line. Raises DataFault (missing_file, broken_json)."""
        begin, end, _ = self._spans[row].tolist()
        return parse_object(read_span(self.path, begin, end))


def scan(path: str) -> np.ndarray:
    """Begin, end (without the newline) and number from 1 of every line that is not blank, int64 [lines, 3].

    Raises DataError when the file cannot be read.
    """
    newlines, returns, length, last = [], [], 0, 0
    try:
        with storage.open_binary(path) as file:
            while chunk := file.read(_CHUNK):
                content = np.frombuffer(chunk, dtype=np.uint8)
                found = np.flatnonzero(content == ord("\n"))
                newlines.append(found + length)
                returns.append(np.where(found > 0, content[found - 1], last) == ord("\r"))
                length, last = length + len(chunk), content[-1]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from None
    ends = np.concatenate([*newlines, [length]]).astype(np.int64)
    begins = np.concatenate([[0], ends[:-1] + 1])
    lines = np.stack([begins, ends, np.arange(1, len(ends) + 1)], axis=1)
    returned = np.concatenate([*returns, [False]])  # a line that is only the \r of \r\n is blank, too
    return lines[ends - begins > returned]


def read_span(path: str, begin: int, end: int) -> bytes:
    """Bytes begin .. end-1. Raises DataFault (missing_file)."""
    try:
        return storage.read(path, begin, end)
    except OSError as error:
        raise DataFault("missing_file", f"the file cannot be read ({error.strerror or error})") from None


def parse_object(content: bytes) -> dict:
    """One JSON object. Raises DataFault (broken_json)."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataFault("broken_json", f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataFault("broken_json", f"a JSON object is expected, found {type(value).__name__}")
    return value
