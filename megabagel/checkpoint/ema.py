"""The moving average in a checkpoint: whole tensors under `ema.<name of the parameter>`, for any layout to load.

In memory each data-parallel rank holds flat shards; here they are put together for saving and cut again after loading.
"""

from dataclasses import replace
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

PREFIX = "ema."


class Average(Protocol):
    """What is needed of the moving average (`megabagel.training.ema.ShardedEma`)."""

    optimizers: list[DistributedOptimizer]

    def by_parameter(self) -> dict[Tensor, tuple[Tensor, int, int]]:
        """Model parameter -> (this rank's shard, start, end in the flat parameter)."""


def for_saving(ema: Average, model_state: ShardedStateDict) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    """Whole averages, float32 on the CPU, spread evenly over the data-parallel ranks: each rank gets every n-th one."""
    entries = _entries(model_state)
    shards = ema.by_parameter()
    result = {}
    for index, (parameter, group) in enumerate(_parameters(ema)):
        owners = dist.get_process_group_ranks(group)
        owner = owners[index % len(owners)]
        whole = torch.zeros(parameter.numel(), dtype=torch.float32)
        if parameter in shards:
            shard, start, end = shards[parameter]
            whole[start:end].copy_(shard)
        dist.reduce(whole, owner, group=group)  # shards are disjoint: the sum with zeros is exact
        if dist.get_rank() == owner:
            entry = entries[parameter]
            # this rank is the one that writes, as far as data parallelism goes
            result[index] = _entry(entry, whole.view(parameter.shape), (*entry.replica_id[:-1], 0))
    return result


def for_loading(ema: Average, model_state: ShardedStateDict) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    """Requests for the whole averages of this rank's parameters."""
    entries = _entries(model_state)
    return {
        index: _entry(entries[parameter], torch.empty(parameter.shape), entries[parameter].replica_id)
        for index, (parameter, _) in enumerate(_parameters(ema))
    }


@torch.no_grad()
def put(ema: Average, loaded: dict[int, Tensor]) -> None:
    """Take this rank's shards out of what was loaded for `for_loading`'s requests."""
    shards = ema.by_parameter()
    for index, (parameter, _) in enumerate(_parameters(ema)):
        if parameter in shards:
            shard, start, end = shards[parameter]
            shard.copy_(loaded[index].flatten()[start:end])


def _parameters(ema: Average) -> list[tuple[Tensor, dist.ProcessGroup]]:
    """Trainable parameters in one order on all data-parallel ranks, with the gloo group over which they are sharded."""
    return [
        (parameter, optimizer.data_parallel_group_gloo)
        for optimizer in ema.optimizers
        for buffer in optimizer.buffers
        for parameter in buffer.param_index_map
    ]


def _entries(model_state: ShardedStateDict) -> dict[Tensor, ShardedTensor | ShardedTensorFactory]:
    return {
        entry.data: entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }


def _entry(
    model_entry: ShardedTensor | ShardedTensorFactory, data: Tensor, replica_id: tuple[int, ...]
) -> ShardedTensor | ShardedTensorFactory:
    changes = {"key": PREFIX + model_entry.key, "data": data, "replica_id": replica_id}
    if isinstance(model_entry, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(model_entry, **changes)
