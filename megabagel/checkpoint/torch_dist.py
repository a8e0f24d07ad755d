"""Single tensors out of a checkpoint in torch_dist format, without process groups and without loading the rest.

A tensor is put together from the pieces that the ranks of the saving run wrote. Whole runs are loaded by
`distributed.py`; what the tensors are called in a BAGEL folder is `released.py`'s matter.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megabagel.checkpoint import folder
from megabagel.checkpoint.errors import CheckpointError, UnreadableError
from megabagel.checkpoint.pieces import Piece

logger = logging.getLogger(__name__)


def checkpoint_folder(path: str | Path) -> Path:
    """`path` itself, or the newest whole checkpoint in it if it is a run folder.

    Raises CheckpointError when there is none, or the one that is meant is damaged.
    """
    path = Path(path)
    if (path / ".metadata").is_file() or (path / folder.FILES).is_file():
        damage = folder.damage(path)
        if damage:
            raise CheckpointError(f"checkpoint {path} {damage}; copy it again or take another one")
        return path
    for step in folder.steps_to_try(path):
        candidate = folder.step_folder(path, step)
        if (damage := folder.damage(candidate)) is None:
            return candidate
        logger.error("Checkpoint %s %s; trying the one before it.", candidate, damage)
    raise CheckpointError(f"{path} is neither a checkpoint (iter_...) nor a run folder that holds a whole one")


class TorchDist:
    """The tensors of one checkpoint folder by key, read piece by piece."""

    def __init__(self, source: Path):
        """Raises CheckpointError when the folder's table of contents cannot be read."""
        self.source = Path(source)
        self._chunks: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # of a key: begins and ends [chunks, dimensions]
        try:
            self._metadata = FileSystemReader(str(source)).read_metadata()
        except Exception as error:  # a damaged file may raise anything
            raise UnreadableError(f"checkpoint {source}: .metadata cannot be read ({error}); copy it again") from None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for key, entry in self._metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.shapes[key], self.dtypes[key] = tuple(entry.size), entry.properties.dtype

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """The tensor `key`, or the part of it that `index` into its first dimensions names."""
        whole, rest = self.shapes[key], self.shapes[key][len(index) :]
        out = torch.empty(rest, dtype=self.dtypes[key])
        part = out.view([1] * len(index) + list(rest))
        self.read_into([Piece(key, whole, (*index, *[0] * len(rest)), part)])
        return out

    def has_object(self, key: str) -> bool:
        return MetadataIndex(key) in self._metadata.storage_data

    def read_object(self, key: str) -> object:
        """An object that is no tensor, by its key (`rng/shard_0_2`). It is unpickled: trust the folder. KeyError."""
        entry = self._metadata.storage_data[MetadataIndex(key)]
        return load_object(self.source, key, entry)[0]

    def read_into(self, pieces: Iterable[Piece]) -> None:
        """Fill the data of `pieces`, converting types; needs no more memory than one stored piece besides.

        Their keys and global shapes must be the checkpoint's (`shapes`). Raises UnreadableError, when some may be
        filled already.
        """
        wanted: dict[MetadataIndex, list[tuple[Tensor, tuple[slice, ...]]]] = defaultdict(list)
        for piece in pieces:
            covered = 0
            for index, target, source in self._overlaps(piece):
                wanted[index].append((target, source))
                covered += target.numel()
            if covered != piece.data.numel():
                raise UnreadableError(f"checkpoint {self.source}: pieces of {piece.key} are missing; copy it again")
        entries = self._metadata.storage_data
        memory = bytearray(max((entries[index].length for index in wanted), default=0))
        for index in sorted(wanted, key=lambda i: (entries[i].relative_path, entries[i].offset)):
            stored = load_tensor(self.source, index.fqn, entries[index], memory)
            for target, source in wanted[index]:
                target.copy_(stored[source])

    def _overlaps(self, piece: Piece) -> Iterator[tuple[MetadataIndex, Tensor, tuple[slice, ...]]]:
        """(a stored piece, the part of the piece's data that it has, where that is in the stored piece)."""
        key = piece.key
        if key not in self._chunks:
            chunks = self._metadata.state_dict_metadata[key].chunks
            begins = np.array([tuple(c.offsets) for c in chunks], dtype=np.int64).reshape(len(chunks), -1)
            sizes = np.array([tuple(c.sizes) for c in chunks], dtype=np.int64).reshape(len(chunks), -1)
            self._chunks[key] = begins, begins + sizes
        begins, ends = self._chunks[key]
        start = np.array(piece.offsets, dtype=np.int64)
        lows = np.maximum(begins, start)
        highs = np.minimum(ends, start + np.array(piece.data.shape, dtype=np.int64))
        for number in np.flatnonzero((lows < highs).all(axis=1)):
            low, high, begin = lows[number], highs[number], begins[number]
            index = MetadataIndex(key, begin.tolist())
            yield index, piece.data.detach()[_slices(low - start, high - start)], _slices(low - begin, high - begin)


def load_object(folder: Path, key: str, entry: _StorageInfo) -> Any:
    """What is stored of `key` at a place in the files of `folder`; unpickled. Raises UnreadableError."""
    with _opened(folder, key, entry) as view:
        return torch.load(view, map_location="cpu", weights_only=False)


def load_tensor(folder: Path, key: str, entry: _StorageInfo, memory: bytearray) -> Tensor:
    """The tensor at a place in the files of `folder`, in `memory` ([>= entry.length] bytes) until that is used again.

    Pieces of a gigabyte in all pass through one piece's memory: new memory for each would cost as much as reading it.
    Raises UnreadableError.
    """
    with _opened(folder, key, entry) as view:
        with torch.serialization.skip_data():
            form = torch.load(view, map_location="cpu", weights_only=True)
        size = form.untyped_storage().nbytes()
        if size == 0:
            return form
        view.seek(0)
        view.seek(torch._C.PyTorchFileReader(view).get_record_offset("data/0"))
        if view.readinto(memoryview(memory)[:size]) != size:
            raise EOFError("the file is cut short")
        data = torch.frombuffer(memory, dtype=form.dtype, count=size // form.itemsize)
        return data.as_strided(form.size(), form.stride(), form.storage_offset())


@contextmanager
def _opened(folder: Path, key: str, entry: _StorageInfo) -> Iterator[IO[bytes]]:
    """The part of a file that an entry names, as a file; whatever goes wrong inside becomes an UnreadableError."""
    try:
        with open(folder / entry.relative_path, "rb", buffering=0) as file:
            yield _create_file_view(file, entry.offset, entry.length)
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnreadableError(f"checkpoint {folder}: {key} cannot be read ({reason}); copy it again") from None


def _slices(begin: np.ndarray, end: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(begin.tolist(), end.tolist(), strict=True))
