"""What a format may use besides its row: draws keyed by the visit, and pictures and files below the data set's folder.

Nothing outside that folder is ever opened: rows may come from strangers.
"""

import os
import posixpath
import stat
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from megabagel.config.datasets import FrameSamplerArgs, is_url
from megabagel.data.document import ImageSource
from megabagel.data.faults import DataFault
from megabagel.runtime import rng


@dataclass
class Context:
    """One visit of one row."""

    key: tuple[int, ...]  # group, row, visit
    seed: int
    folder: str  # of the data set, or a URL
    row: dict = field(default_factory=dict)
    frames: FrameSamplerArgs = field(default_factory=lambda: FrameSamplerArgs(max_num_frames=12))
    sizes: list[tuple[int, int] | None] = field(default_factory=list)  # of the row's pictures, from an index
    _num_images: int = 0

    def generator(self, purpose: str) -> np.random.Generator:
        """Draws that depend on the seed, `purpose` and this visit alone."""
        return rng.generator(self.seed, purpose, self.key)

    def image(self, reference: object, number: int | None = None) -> ImageSource:
        """A picture of the row: encoded bytes, a name below the data set's folder, the ending of a member of the same
        WebDataset sample, or the {bytes, path} of a parquet column of pictures.

        `number`: its place among the row's pictures, where a format does not name them in order or not all of them.
        Raises DataFault (bad_row, path_outside, missing_file).
        """
        if number is None:
            number = self._num_images
        self._num_images = number + 1
        size = self.sizes[number] if number < len(self.sizes) else None
        if isinstance(reference, dict):
            reference = reference.get("bytes") or reference.get("path")
        if isinstance(reference, str) and isinstance(member := self.row.get(reference.lower()), bytes):
            reference = member
        if isinstance(reference, bytes):
            return ImageSource(number, content=reference, size=size)
        if not isinstance(reference, str) or not reference:
            raise DataFault("bad_row", f"picture {number} must be a file name or bytes, found {_brief(reference)}")
        return ImageSource(number, path=self.path(reference), size=size)

    def path(self, name: str) -> str:
        """Absolute path or URL of a file or folder named in the row. Raises DataFault (path_outside, bad_row)."""
        if is_url(self.folder):
            return _remote_path(self.folder, name)
        return _local_path(self.folder, name)


def _remote_path(folder: str, name: str) -> str:
    root = folder.rstrip("/") + "/"
    inside = name.removeprefix(root)
    parts = posixpath.normpath(inside).split("/")  # the first is empty where the name begins with a slash
    if is_url(inside) or "::" in inside or parts[0] in ("", "..") or "\0" in inside:  # fsspec chains URLs with ::
        raise _outside(name, folder)
    return root + "/".join(parts)


def _local_path(folder: str, name: str) -> str:
    """Raises DataFault when the name, or a link on its way, leads out of `folder`."""
    if is_url(name):
        raise _outside(name, folder)
    path = os.path.normpath(os.path.join(folder, name))
    try:
        root = _real(folder)
        if not _is_below(path, os.path.normpath(folder)) and not _is_below(path, root):
            raise _outside(name, folder)
        real = os.path.realpath(path, strict=True)
        mode = os.stat(real).st_mode
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return _missing(path, name, folder)
    except (OSError, ValueError) as error:  # a loop of links, a name too long or with characters that no name has
        raise DataFault("path_outside", f"{_brief(name)} is no usable path below {folder} ({_reason(error)})") from None
    if not _is_below(real, root):
        raise _outside(name, folder)
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataFault("bad_row", f"{path} is neither a file nor a folder")
    return path


def _missing(path: str, name: str, folder: str) -> str:
    """The same path, which is said to be missing once something reads it, unless it would lie outside."""
    if not _is_below(os.path.realpath(path), _real(folder)):
        raise _outside(name, folder)
    return path


@lru_cache(maxsize=256)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _outside(name: str, folder: str) -> DataFault:
    return DataFault(
        "path_outside", f"{_brief(name)} leads out of {folder}; set data_dir to a folder with all pictures"
    )


def _reason(error: OSError | ValueError) -> str:
    return error.strerror if isinstance(error, OSError) else str(error)


def _brief(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
