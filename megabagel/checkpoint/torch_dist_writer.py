"""Writes checkpoints in torch_dist format (megatron-core's, on torch.distributed.checkpoint), without process groups.

Each rank writes its pieces to files of its own; one rank then writes the table of contents from what all of them
report. Training and the offline converters use it; folders, `latest` and retention are `folder`'s matter.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo  # part of the format: it is pickled in .metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megabagel.checkpoint.file_record import record_of, recorded
from megabagel.checkpoint.folder import FileRecord, sync
from megabagel.checkpoint.pieces import Piece

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Item:
    """One stored rectangle of a tensor and its place in the files; an object has neither shape nor `dtype`."""

    key: str
    global_shape: tuple[int, ...]
    lengths: tuple[int, ...]
    dtype: torch.dtype | None
    result: WriteResult


@dataclass(frozen=True)
class Written:
    """What one call of `PieceWriter.write` wrote; picklable, for `finish`."""

    items: list[Item] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)  # by name in the folder


class PieceWriter:
    """Writes the files `__{rank}_{i}.distcp` of a rank, one per call; the folder must exist."""

    def __init__(self, folder: str | Path, rank: int, first: int = 0):
        """`first`: number of the first file, when there are some of this rank already."""
        self.folder, self.rank, self.number = Path(folder), rank, first

    def write(self, pieces: Iterable[Piece], objects: dict[str, object] | None = None) -> Written:
        """Write pieces, and objects by their keys (`rng/shard_0_2`: entry 0 of 2), to one new file; it is on disk then.

        The pieces are consumed one by one, so a generator may make them when they are asked for. Pieces on a GPU, of
        another `dtype` or not contiguous are copied one at a time; others are written from where they are. Raises
        OSError.
        """
        name = f"__{self.rank}_{self.number}.distcp"
        self.number += 1
        items = []
        with recorded(self.folder / name) as file:
            for piece in pieces:
                index = MetadataIndex(piece.key, torch.Size(piece.offsets))
                begin = file.tell()
                torch.save(_alone(piece), file)
                shape = tuple(piece.data.shape)
                result = _result(index, name, begin, file.tell())
                items.append(Item(piece.key, piece.global_shape, shape, piece.stored_dtype, result))
            for key, value in (objects or {}).items():
                begin = file.tell()
                torch.save([value], file)
                items.append(Item(key, (), (), None, _result(MetadataIndex(key), name, begin, file.tell())))
        return Written(items, {name: file.record})


def finish(folder: str | Path, written: Sequence[Written], common: dict[str, object]) -> dict[str, FileRecord]:
    """Write the table of contents of all that was written, and `common` (plain objects); returns all files' records.

    All of it is on disk then. Raises ValueError when the pieces of a tensor do not fill it, and OSError.
    """
    folder = Path(folder)
    items = [item for part in written for item in part.items]
    metadata = Metadata(_contents(items))
    FileSystemWriter(folder).finish(metadata, [[item.result for item in items]])
    files = {name: record for part in written for name, record in part.files.items()}
    files[METADATA] = record_of(folder / METADATA)
    with recorded(folder / COMMON) as file:
        torch.save(common, file)
    files[COMMON] = file.record
    with recorded(folder / FORMAT) as file:
        file.write(json.dumps(_FORMAT).encode())
    files[FORMAT] = file.record
    sync(folder)
    return files


def _contents(items: list[Item]) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
    contents, missing = {}, {}
    for item in items:
        if item.dtype is None:
            contents[item.key] = BytesStorageMetadata()
            continue
        if item.key not in contents:
            size = torch.Size(item.global_shape)
            contents[item.key] = TensorStorageMetadata(TensorProperties(item.dtype), size, [])
            missing[item.key] = size.numel()
        entry = contents[item.key]
        if (entry.size, entry.properties.dtype) != (item.global_shape, item.dtype):
            raise ValueError(
                f"pieces of {item.key} disagree: {tuple(entry.size)} {entry.properties.dtype} and "
                f"{item.global_shape} {item.dtype}"
            )
        lengths = torch.Size(item.lengths)
        entry.chunks.append(ChunkStorageMetadata(item.result.index.offset, lengths))
        missing[item.key] -= lengths.numel()
    for key, count in missing.items():
        if count:
            size = contents[key].size
            raise ValueError(
                f"the pieces of {key} {tuple(size)} have {size.numel() - count} elements instead of {size.numel()}"
            )
    return contents


def _result(index: MetadataIndex, name: str, begin: int, end: int) -> WriteResult:
    return WriteResult(index, end - begin, _StorageInfo(name, begin, end - begin))


def _alone(piece: Piece) -> Tensor:
    """The data on the CPU in the stored type, in a storage that holds nothing else: `torch.save` writes it whole."""
    data = piece.data.detach().to("cpu", piece.stored_dtype).contiguous()
    if data.untyped_storage().nbytes() == data.nbytes:
        return data
    if data.numel() == 0:
        return data.clone()
    return torch.frombuffer(data.view(-1).view(torch.uint8).numpy(), dtype=data.dtype).view(data.shape)
