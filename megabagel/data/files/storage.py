"""Bytes of local files and of everything that fsspec reaches (s3://, gs://, https://, ...), by the same few functions.

No cache and no open handles: what is here can be called from any process. What the bytes mean is decided elsewhere.
"""

import glob
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

import fsspec

from megabagel.config.datasets import is_url
from megabagel.data.faults import DataError

ATTEMPTS = 3  # of reading from a URL, where a network may be down for a moment
_PAUSE = 0.5  # seconds before the second attempt

T = TypeVar("T")


def list_files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The file at `path`; the files of a folder, or those that match a pattern, with one of `suffixes`, in name order.

    Empty when there is nothing of the kind. Raises OSError where a URL cannot be listed.
    """
    if is_url(path):
        return _list_remote(path, suffixes)
    if "*" in path:
        found = glob.glob(path, recursive=True)
    elif os.path.isdir(path):
        found = [os.path.join(path, name) for name in os.listdir(path)]
    else:
        return [path] if os.path.exists(path) else []
    return sorted(file for file in found if suffix(file) in suffixes and os.path.isfile(file))


def _list_remote(path: str, suffixes: tuple[str, ...]) -> list[str]:
    system, inner = _remote(path)
    if "*" in path:
        found = _tried(lambda: system.glob(inner))
    elif _tried(lambda: system.isfile(inner)):
        return [path]
    elif _tried(lambda: system.isdir(inner)):
        found = _tried(lambda: system.ls(inner, detail=False))
    else:
        return []
    start = path.removesuffix(inner.lstrip("/"))  # protocols, which the system leaves out of names
    return sorted(start + file.lstrip("/") for file in found if suffix(file) in suffixes)


def suffix(path: str) -> str:
    """The file's suffix in small letters, with its dot."""
    return PurePosixPath(path).suffix.lower()


def is_file(path: str) -> bool:
    """Whether there is a file. Raises OSError where a URL cannot be reached."""
    if not is_url(path):
        return Path(path).is_file()
    system, inner = _remote(path)
    return _tried(lambda: system.isfile(inner))


def is_folder(path: str) -> bool:
    """Whether there is a folder. Raises OSError where a URL cannot be reached."""
    if not is_url(path):
        return Path(path).is_dir()
    system, inner = _remote(path)
    return _tried(lambda: system.isdir(inner))


def read(path: str, begin: int = 0, end: int | None = None) -> bytes:
    """Bytes begin .. end-1 of a file, null: to its end. Raises OSError (FileNotFoundError)."""
    if is_url(path):
        system, inner = _remote(path)
        return _tried(lambda: system.cat_file(inner, start=begin, end=end))
    with open(path, "rb") as file:
        file.seek(begin)
        return file.read(-1 if end is None else end - begin)


def open_binary(path: str) -> BinaryIO:
    """The file for reading in any order. Raises OSError."""
    if is_url(path):
        system, inner = _remote(path)
        return _tried(lambda: system.open(inner, "rb"))
    return open(path, "rb")


def stamp(path: str) -> tuple[int, str]:
    """Bytes of a file, and its last change as far as it is known. Raises OSError."""
    if not is_url(path):
        found = os.stat(path)
        return found.st_size, str(found.st_mtime_ns)
    system, inner = _remote(path)
    found = _tried(lambda: system.info(inner))
    changed = next((found[key] for key in ("ETag", "etag", "LastModified", "mtime", "created") if found.get(key)), "")
    return found["size"], str(changed)


def _remote(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        protocol = path.partition("://")[0]
        raise DataError(
            f"{path} cannot be read ({error}); install the fsspec package of {protocol}:// or use a local path."
        ) from None


def _tried(action: Callable[[], T]) -> T:
    """What `action` returns. A failed attempt is repeated, as a row lost to the network would change the run."""
    for attempt in itertools.count(1):
        try:
            return action()
        except (FileNotFoundError, PermissionError, MemoryError):
            raise
        except Exception as error:  # each protocol has exceptions of its own
            if attempt == ATTEMPTS:
                raise OSError(f"{type(error).__name__}: {error}") from error
            time.sleep(_PAUSE * 2 ** (attempt - 1))
