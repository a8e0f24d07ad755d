"""A JSON file that holds a list of objects, by number: the file itself is a list, or an object with one list inside.

Offsets are found once, so that no process keeps the parsed file; above some GB jsonl is the better choice.
"""

import json
import re

import numpy as np

from megabagel.data.faults import DataError, Fault
from megabagel.data.files import storage
from megabagel.data.files.index import Index, Places
from megabagel.data.files.jsonl import parse_object, read_span

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_BYTE_ORDER_MARK = b"\xef\xbb\xbf".decode("latin-1")


class JsonArray:
    """Random access to the elements of one file's list."""

    def __init__(self, path: str, index: Index | None = None) -> None:
        """Raises DataError when the file cannot be read."""
        self.path = path
        self.blocks: list[int] | None = None  # elements are read one by one
        self.index = index
        self._spans, self.faults = scan(path) if index is None else (index.places.spans, index.faults)
        self.num_rows = len(self._spans)

    def label(self, row: int) -> str:
        """The element's number from 0, for messages."""
        return f"element {row}"

    def places(self) -> Places:
        """Where the rows lie, for an index."""
        return Places.one_each(self._spans)

    def __getitem__(self, row: int) -> dict:
        """The parsed element. Raises DataFault (missing_file, broken_json)."""
        begin, end = self._spans[row].tolist()
        return parse_object(read_span(self.path, begin, end))


def scan(path: str) -> tuple[np.ndarray, list[Fault]]:
    """Begin and end of each element in bytes, int64 [elements, 2], and what stopped the reading, if anything.

    Raises DataError when the file cannot be read.
    """
    try:
        content = storage.read(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from None
    spans: list[tuple[int, int]] = []
    faults: list[Fault] = []
    try:
        # As Latin-1 a character is a byte, so that offsets are right; strings are decoded when a row is read.
        text = content.decode("latin-1")
        begin = len(_BYTE_ORDER_MARK) if text.startswith(_BYTE_ORDER_MARK) else 0
        _elements(text, _find_list(text, _skip(text, begin)), spans)
    except (ValueError, RecursionError) as error:
        lost = f"all elements from number {len(spans)} on are lost" if spans else "all its rows are lost"
        faults.append(Fault("broken_json", path, f"not a valid JSON list of objects ({error}); {lost}"))
    return np.array(spans, dtype=np.int64).reshape(-1, 2), faults


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _find_list(text: str, at: int) -> int:
    """Where the list of rows begins. Raises ValueError when there is none, or more than one."""
    if text.startswith("[", at):
        return at
    if not text.startswith("{", at):
        raise ValueError("a list, or an object with one list inside, is expected")
    lists, at = [], _skip(text, at + 1)
    while not text.startswith("}", at):
        key, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        if not text.startswith(":", at):
            raise ValueError(f"':' is expected at byte {at}")
        at = _skip(text, at + 1)
        if text.startswith("[", at):
            lists.append(at)
        _, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        at = _skip(text, at + 1) if text.startswith(",", at) else at
    if len(lists) != 1:
        raise ValueError(f"an object with one list inside is expected, found {len(lists)} lists")
    return lists[0]


def _elements(text: str, at: int, spans: list[tuple[int, int]]) -> None:
    """Append the span of each element of the list that begins at `at`. Raises ValueError where it is broken."""
    at = _skip(text, at + 1)
    while not text.startswith("]", at):
        _, end = _DECODER.raw_decode(text, at)
        spans.append((at, end))
        at = _skip(text, end)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
        elif not text.startswith("]", at):
            raise ValueError(f"',' or ']' is expected at byte {at}")
