"""Where the tensors of this rank's model belong in a checkpoint, as the model's `sharded_state_dict` tells.

Only keys and places: no values are read or moved here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megabagel.checkpoint.pieces import Piece, Place


@dataclass(frozen=True)
class Placed:
    """A parameter or buffer; `parts`: (number of its first element in the flattened tensor, place), in order."""

    data: Tensor
    parts: tuple[tuple[int, Place], ...]
    replica: tuple[int, ...]  # all 0 on the one rank that would write it; the last one counts data-parallel ranks

    @property
    def written_here(self) -> bool:
        """By this rank or one of its data-parallel siblings."""
        return not any(self.replica[:-1])

    @property
    def is_expert(self) -> bool:
        """Whether experts' data-parallel ranks hold the tensor, which are others than those of the rest."""
        return not getattr(self.data, "allreduce", True)

    @property
    def holders(self) -> int:
        """How many data-parallel ranks hold the tensor; `replica[-1]` is the number of this one among them."""
        if self.is_expert:
            return parallel_state.get_expert_data_parallel_group().size()
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def pieces(self, values: Tensor, start: int, prefix: str = "", dtype: torch.dtype | None = None) -> list[Piece]:
        """`values` (1-D) of the elements from `start` on of the flattened tensor, under its keys with a prefix."""
        found = []
        for first, place in self.parts:
            low, high = max(start, first), min(start + len(values), first + math.prod(place.shape))
            if low < high:
                renamed = Place(prefix + place.key, place.global_shape, place.offsets, place.shape)
                found += renamed.flat(values[low - start : high - start], low - first, dtype)
        return found

    def shapes(self, prefix: str = "") -> dict[str, tuple[int, ...]]:
        """Global shapes by key."""
        return {prefix + place.key: place.global_shape for _, place in self.parts}


@dataclass(frozen=True)
class PlacedObject:
    """Extra state of a module that is no tensor (Transformer Engine's scales): its name in the module, and its key."""

    chunk: int
    name: str
    key: str
    data: object
    written_here: bool


def placed(chunks: Sequence[DistributedDataParallel]) -> tuple[list[Placed], list[PlacedObject]]:
    """All parameters, buffers and extra states of the model chunks, in an order that data-parallel ranks share."""
    tensors, objects = [], []
    for index, chunk in enumerate(chunks):
        for name, entry in chunk.module.sharded_state_dict().items():
            if isinstance(entry, ShardedObject):
                is_written = not any(entry.replica_id)
                objects.append(PlacedObject(index, name, entry.unique_key, entry.data, is_written))
            else:
                tensors.append(Placed(entry.data, tuple(_parts(entry)), entry.replica_id))
    return tensors, objects


def _parts(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[int, Place]]:
    if isinstance(entry, ShardedTensor):
        yield 0, _place(entry)
        return
    # the factory cuts a tensor without memory: where its parts lie there is where they lie in the real one
    model = torch.empty(entry.data.shape, dtype=entry.data.dtype, device="meta")
    for part in entry.build_fn(entry.key, model, entry.replica_id, None):
        if not part.data.is_contiguous():
            raise ValueError(f"{part.key}: a part of a parameter must be a range of its elements")
        yield part.data.storage_offset(), _place(part)


def _place(part: ShardedTensor) -> Place:
    shape = (*[1] * part.prepend_axis_num, *part.local_shape)
    return Place(part.key, tuple(part.global_shape), tuple(part.global_offset), shape)
