"""Lines of jsonl files by number, through an index of line offsets. Format only: meaning is decided by the sources."""

import json
from bisect import bisect_right
from itertools import accumulate

import numpy as np

from megabagel.config.datasets import GroupConfig
from megabagel.data.faults import DataError, DataFault
from megabagel.runtime import rng

_CHUNK = 1 << 24


class JsonLines:
    """Random access to the used lines of all data sets of a group. `blocks` [data sets]: lines each."""

    def __init__(self, group: GroupConfig) -> None:
        """Raises DataError for a missing file. Blank lines do not count."""
        self.names = list(group.datasets)
        self.paths = [group.datasets[name].jsonl_path for name in self.names]
        self.folders = [group.datasets[name].data_dir for name in self.names]
        self._spans: list[np.ndarray] = []  # [lines, 3] begin, end, line number from 1
        for i, (name, path) in enumerate(zip(self.names, self.paths, strict=True)):
            spans = _index(name, path)
            used = len(spans) if group.num_used_data is None else min(group.num_used_data[i], len(spans))
            if group.shuffle_lines:  # only decides which lines are used; the order of visits is seeded elsewhere
                spans = spans[rng.generator(group.shuffle_seed, "line_choice", (i,)).permutation(len(spans))]
            self._spans.append(spans[:used])
        self.blocks = [len(spans) for spans in self._spans]
        self._ends = list(accumulate(self.blocks))

    def _locate(self, row: int) -> tuple[int, np.ndarray]:
        block = bisect_right(self._ends, row)
        return block, self._spans[block][row - (self._ends[block] - self.blocks[block])]

    def origin(self, row: int) -> str:
        """File and line (from 1), for messages."""
        block, span = self._locate(row)
        return f"{self.paths[block]} line {span[2]}"

    def folder(self, row: int) -> str:
        """Folder that the row's image names are relative to."""
        return self.folders[self._locate(row)[0]]

    def __getitem__(self, row: int) -> dict:
        """The parsed line. Raises DataFault (missing_file, broken_json)."""
        block, (begin, end, _) = self._locate(row)
        try:
            with open(self.paths[block], "rb") as file:
                file.seek(begin)
                line = file.read(end - begin)
        except OSError as error:
            raise DataFault("missing_file", f"the file cannot be read ({error.strerror})") from None
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataFault("broken_json", f"not valid JSON ({error})") from None
        if not isinstance(value, dict):
            raise DataFault("broken_json", f"a JSON object is expected, found {type(value).__name__}")
        return value


def _index(name: str, path: str) -> np.ndarray:
    """Begin, end (without the newline) and number from 1 of every line that is not blank, int64 [lines, 3]."""
    newlines, length = [], 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                newlines.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + length)
                length += len(chunk)
    except OSError as error:
        raise DataError(f"data set {name}: jsonl_path {path} cannot be read ({error.strerror}).") from None
    ends = np.concatenate([*newlines, [length]]).astype(np.int64)
    begins = np.concatenate([[0], ends[:-1] + 1])
    lines = np.stack([begins, ends, np.arange(1, len(ends) + 1)], axis=1)
    return lines[ends - begins > 1]
