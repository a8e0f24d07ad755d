"""Token ids of texts met before, in a sqlite file that worker processes share. Losing it costs time and nothing else.

Best on a local disk: network file systems often lack the locks that sqlite needs, and then the cache turns itself off.
"""

import hashlib
import logging
import sqlite3
import zlib
from pathlib import Path

import numpy as np

from megabagel.data.text import Tokenizer

logger = logging.getLogger(__name__)

MIN_CHARACTERS = 32  # shorter texts are tokenised faster than looked up
_WAIT_S = 5.0  # for another process that writes
_ROWS_PER_WRITE = 64
_CHECKSUM_BYTES = 4


class TokenCache:
    """Looks up before tokenising. Each process opens the file when it first needs it."""

    def __init__(self, folder: str, fingerprint: str) -> None:
        """`fingerprint` of the tokenizer: several may share a folder."""
        self._folder, self._fingerprint = folder, fingerprint
        self._connection: sqlite3.Connection | None = None
        self._unwritten: dict[bytes, bytes] = {}
        self._broken = False

    def __reduce__(self):
        return TokenCache, (self._folder, self._fingerprint)

    def encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Ids of `text`, as `tokenizer.encode` gives them."""
        if self._broken or len(text) < MIN_CHARACTERS:
            return tokenizer.encode(text)
        try:
            key = hashlib.blake2b(f"{self._fingerprint}\n{text}".encode(), digest_size=16).digest()
            ids = self._get(key)
            if ids is None:
                ids = tokenizer.encode(text)
                self._put(key, ids)
            return ids
        except (sqlite3.Error, OSError, ValueError) as error:
            self._give_up(error)
            return tokenizer.encode(text)

    def flush(self) -> None:
        """Write what was not written yet."""
        if self._unwritten and not self._broken:
            with self._open() as connection:
                connection.executemany("INSERT OR IGNORE INTO tokens VALUES (?, ?)", self._unwritten.items())
        self._unwritten.clear()

    def _get(self, key: bytes) -> list[int] | None:
        row = self._open().execute("SELECT ids FROM tokens WHERE key = ?", (key,)).fetchone()
        value = self._unwritten.get(key) if row is None else row[0]
        if value is None:
            return None
        content, checksum = value[:-_CHECKSUM_BYTES], value[-_CHECKSUM_BYTES:]
        if _checksum(content) != checksum:
            raise ValueError("a value does not match its checksum")
        return np.frombuffer(content, dtype="<i4").tolist()

    def _put(self, key: bytes, ids: list[int]) -> None:
        content = np.asarray(ids, dtype="<i4").tobytes()
        self._unwritten[key] = content + _checksum(content)
        if len(self._unwritten) >= _ROWS_PER_WRITE:
            self.flush()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            file = Path(self._folder) / "tokens.sqlite"
            # the reader of one process may prepare in one thread and resume in another, never in both at once
            connection = sqlite3.connect(file, timeout=_WAIT_S, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute("CREATE TABLE IF NOT EXISTS tokens (key BLOB PRIMARY KEY, ids BLOB) WITHOUT ROWID")
            self._connection = connection
        return self._connection

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        self._unwritten.clear()
        logger.warning(
            "token cache %s cannot be used (%s); going on without it. Delete the folder or fix its permissions.",
            self._folder,
            error,
        )


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "little")
