"""Single tensors out of a checkpoint in torch_dist format, without process groups and without loading the rest.

A tensor is put together from the pieces that the ranks of the saving run wrote. Whole runs are loaded by
`distributed.py`; what the tensors are called in a BAGEL folder is `released.py`'s matter.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megabagel.checkpoint import folder
from megabagel.checkpoint.errors import CheckpointError


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
        if folder.damage(candidate) is None:
            return candidate
    raise CheckpointError(f"{path} is neither a checkpoint (iter_...) nor a run folder that holds a whole one")


class TorchDist:
    """The tensors of one checkpoint folder by key, read piece by piece."""

    def __init__(self, source: Path):
        """Raises CheckpointError when the folder's table of contents cannot be read."""
        self.source = source
        self._reader = FileSystemReader(str(source))
        try:
            self._metadata = self._reader.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {source}: .metadata cannot be read ({error}); copy it again") from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for key, entry in self._metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.shapes[key], self.dtypes[key] = tuple(entry.size), entry.properties.dtype

    def read(self, key: str, index: int | None = None) -> Tensor:
        """The tensor `key`; with `index` its entry number `index` along the first dimension."""
        shape = list(self.shapes[key])
        offsets = [0] * len(shape)
        if index is not None:
            offsets[0], shape[0] = index, 1
        out = torch.empty(shape, dtype=self.dtypes[key])
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        items = create_read_items_for_chunk_list(key, self._metadata.state_dict_metadata[key], [wanted])
        if sum(item.lengths.numel() for item in items) != out.numel():
            raise CheckpointError(f"checkpoint {self.source}: pieces of {key} are missing; copy it again")
        try:
            self._reader.read_data(LoadPlan(items), _Into(out)).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"checkpoint {self.source}: {key} cannot be read ({reason}); copy it again") from None
        return out if index is None else out[0]


class _Into(LoadPlanner):
    """Puts what the reader reads into one tensor."""

    def __init__(self, out: Tensor):
        self.out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self.out
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...

    def load_bytes(self, read_item: ReadItem, value: object) -> None:
        raise TypeError(f"{read_item.storage_index.fqn} is no tensor: {LoadItemType.BYTE_IO}")

    def set_up_planner(self, *_, **__) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan
