"""Takes size and checksum of a checkpoint's file while it is written. Who compares them is `folder`'s matter."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megabagel.checkpoint.folder import FileRecord

_BLOCK = 2**20


class RecordedFile:
    """A binary file that is written from beginning to end, and its record so far. It offers what `torch.save` needs."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self.record = FileRecord(0, 0)
        self.error: OSError | None = None  # the first one: torch.save raises another error in its place

    def write(self, data: bytes | memoryview) -> int:
        try:
            self._raw.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        size = memoryview(data).nbytes
        self.record = FileRecord(self.record.size + size, zlib.crc32(data, self.record.crc32))
        return size

    def tell(self) -> int:
        return self.record.size

    def flush(self) -> None:
        self._raw.flush()


@contextmanager
def recorded(path: Path) -> Iterator[RecordedFile]:
    """A new file at `path`, on disk (fsync) when the block ends. Raises OSError, torch.save's too."""
    with open(path, "wb", buffering=_BLOCK) as raw:
        file = RecordedFile(raw)
        try:
            yield file
        except RuntimeError:
            if file.error is None:
                raise
            raise file.error from None
        raw.flush()
        os.fsync(raw.fileno())


def record_of(path: Path) -> FileRecord:
    """The record of a file that is there, read block by block. Raises OSError."""
    size, crc32, block = 0, 0, memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            size, crc32 = size + count, zlib.crc32(block[:count], crc32)
    return FileRecord(size, crc32)
