"""Completes gradients of replicated weights that each tensor-parallel rank computes from its own share of the input.

megatron-core does this for norms under sequence parallelism, over whole gradients; here only this rank's shard of the
distributed optimizer, the one part that is complete and used, is summed.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from torch import Tensor

from megabagel.models.vision_spread import is_partial


def sum_partial_gradients(chunks: list[DistributedDataParallel], group: dist.ProcessGroup) -> None:
    """Sum the marked weights' gradients over `group`, in place, once they are reduced over the data-parallel ranks."""
    if group.size() == 1:
        return
    for buffer in (buffer for chunk in chunks for buffer in chunk.buffers):
        for parts in _complete_parts(buffer):
            flat = torch.cat(parts)
            dist.all_reduce(flat, group=group)
            torch._foreach_copy_(parts, flat.split([len(part) for part in parts]))


def _complete_parts(buffer: _ParamAndGradBuffer) -> Iterator[list[Tensor]]:
    """Per bucket, what this rank's shard of it holds of marked weights: the same places on all ranks of a
    tensor-parallel group."""
    ranks, rank = buffer.data_parallel_group.size(), buffer.data_parallel_group.rank()
    for bucket in buffer.buckets:
        size = bucket.grad_data.numel() // ranks
        parts = []
        for parameter in bucket.params_list:
            if not is_partial(parameter):
                continue
            start, end = (at - bucket.offset for at in buffer.param_index_map[parameter][:2])
            start, end = max(start, rank * size), min(end, (rank + 1) * size)
            if start < end:
                parts.append(bucket.grad_data[start:end])
        if parts:
            yield parts
