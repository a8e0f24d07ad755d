"""Brings what the ranks hold to rank 0 and puts it together: rows of chunks, shards of weights and of gradients."""

from collections import defaultdict

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megabagel.checkpoint.hf import stage_rules
from megabagel.checkpoint.names import export_shard
from megabagel.models.bagel import Bagel
from parity.measure import Captured

# released name -> this rank's shard, dimension along which tensor-parallel ranks split it (None: not split)
Shards = dict[str, tuple[Tensor, int | None]]
# name -> tensor-parallel rank -> (places, rows) of every replica, chunk and micro-batch
Rows = dict[str, dict[int, list[tuple[Tensor, Tensor]]]]

_SPREAD = "vit_last_hidden"  # the tensor-parallel ranks run the tower on different pictures


def gather(value: object) -> list | None:
    """Every rank's object on rank 0, in rank order; None elsewhere."""
    if dist.get_world_size() == 1:
        return [value]
    out = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, out)
    return out


def export(stages: list[Bagel], values: list[dict[str, Tensor]]) -> Shards:
    """Per stage values by parameter name -> this rank's shards by released name, on the CPU."""
    shards: Shards = {}
    for stage, of_stage in zip(stages, values, strict=True):
        rules = stage_rules(stage)
        for parameter, value in of_stage.items():
            for name, (shard, dim) in export_shard(value, rules[parameter]).items():
                shards[name] = shard.detach().float().cpu().clone(), dim
    return shards


def gather_tensors(shards: Shards) -> dict[str, list[Tensor]] | None:
    """Whole tensors by released name on rank 0: every copy that the ranks hold, sharded ones put together.

    An expert-parallel rank does not hold every tensor; what it holds of the experts is whole.
    """
    position = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    everything = gather((position, parallel_state.get_tensor_model_parallel_rank(), shards))
    if everything is None:
        return None
    by_position = defaultdict(lambda: defaultdict(list))
    for position, tp_rank, held in everything:
        for name, (shard, dim) in held.items():
            by_position[position][name].append((tp_rank, shard, dim))
    whole: dict[str, list[Tensor]] = defaultdict(list)
    for held in by_position.values():
        for name, parts in held.items():
            parts.sort(key=lambda part: part[0])
            tensors, dim = [shard for _, shard, _ in parts], parts[0][2]
            whole[name].extend(tensors if dim is None else [torch.cat(tensors, dim=dim)])
    return dict(whole)


def gather_rows(captured: list[Captured]) -> Rows | None:
    """Forward values of this rank's micro-batches, all ranks' on rank 0."""
    everything = gather((parallel_state.get_tensor_model_parallel_rank(), captured))
    if everything is None:
        return None
    rows: Rows = defaultdict(lambda: defaultdict(list))
    for tp_rank, of_rank in everything:
        for held in of_rank:
            for name, part in held.items():
                rows[name][0 if name == _SPREAD else tp_rank].append(part)
    return rows


def gather_gradient_shards(chunks: list[DistributedDataParallel]) -> None:
    """Complete the gradient buffers, of which the distributed optimizer's reduction fills this rank's shard only."""
    for buffer in (buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
