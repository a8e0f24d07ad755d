"""Samples of a WebDataset tar file by number: members that share a name up to its first dot are one row.

Only headers are read to find them; members are then read one by one. Compressed archives have no random access.
"""

import os
import sys
import tarfile

import numpy as np

from megabagel.data.faults import DataError, DataFault, Fault
from megabagel.data.files import storage
from megabagel.data.files.index import Index, Places
from megabagel.data.files.jsonl import parse_object, read_span
from megabagel.data.files.pictures import PICTURE_SUFFIXES


class Tar:
    """Random access to the samples of one tar file."""

    def __init__(self, path: str, index: Index | None = None) -> None:
        """Raises DataError when the file cannot be opened; what is damaged in it becomes `faults`."""
        self.path = path
        self.blocks: list[int] | None = None  # samples are read one by one
        self.index = index
        self._members, self.faults = scan(path) if index is None else (index.places, index.faults)
        self.num_rows = len(self._members.names)

    def label(self, row: int) -> str:
        """The sample's name, for messages."""
        return f"sample {self._members.names[row]}"

    def places(self) -> Places:
        """Where the rows lie, for an index."""
        return self._members

    def __getitem__(self, row: int) -> dict:
        """Keys of the json members, `text` from txt, `image` from a picture; every other member and every picture is
        there as bytes under what follows the first dot of its name. Raises DataFault (missing_file, broken_json)."""
        content: dict = {}
        members: dict = {}
        first, last = self._members.starts[row : row + 2].tolist()
        for member in range(first, last):
            ending = self._members.endings[member]
            begin, end = self._members.spans[member].tolist()
            data = read_span(self.path, begin, end)
            kind = storage.suffix(f"x.{ending}")
            if kind == ".json":
                content |= parse_object(data)
            elif kind == ".txt":
                members["text"] = _decode(data, ending)
            else:
                members[ending] = data
                if kind in PICTURE_SUFFIXES and "." not in ending:
                    members["image"] = data
        return members | content


def scan(path: str) -> tuple[Places, list[Fault]]:
    """Samples in the order of their first member, and what cannot be read.

    Raises DataError when the file cannot be opened.
    """
    samples: dict[str, list[tuple[int, int, str]]] = {}
    faults: list[Fault] = []
    try:
        with storage.open_binary(path) as file:
            try:
                _collect(file, path, samples, faults)
            except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
                faults.append(Fault("unreadable_tar", path, f"{error}; members from there on are lost"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from None
    members = [member for group in samples.values() for member in group]
    starts = np.cumsum([0, *(len(group) for group in samples.values())], dtype=np.int64)
    spans = np.array([member[:2] for member in members], dtype=np.int64).reshape(-1, 2)
    return Places(spans, starts, names=list(samples), endings=[member[2] for member in members]), faults


def _collect(file, path: str, samples: dict[str, list[tuple[int, int, str]]], faults: list[Fault]) -> None:
    """Append (begin, end, ending) of every file in the archive to its sample. Raises TarError where it is damaged."""
    end, total = 0, file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # the archive would keep them all
            if member.size < 0 or archive.offset <= end:
                raise tarfile.ReadError(f"the header of {member.name} is damaged")
            if member.offset_data + member.size > total:
                raise tarfile.ReadError(f"member {member.name} is cut off")
            end = archive.offset
            folder, _, name = member.name.rpartition("/")
            stem, dot, ending = name.partition(".")
            if member.isdir() or not dot or not stem:
                continue
            if not member.isreg():
                faults.append(Fault("bad_row", f"{path} member {member.name}", "is not a regular file; it is not read"))
                continue
            key = f"{folder}/{stem}" if folder else stem
            samples.setdefault(key, []).append(
                (member.offset_data, member.offset_data + member.size, sys.intern(ending.lower()))
            )
        file.seek(archive.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"no valid header at byte {archive.offset}")


def _decode(data: bytes, ending: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataFault("bad_row", f"member .{ending} is not UTF-8 ({error})") from None
