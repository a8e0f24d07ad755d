"""Gradients after a step, by released tensor name, as every rank holds them once they are reduced.

`Held` is what the workers send; `whole_norms` puts the shards of tensor-parallel ranks together.
"""

from collections import defaultdict

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megabagel.checkpoint.hf import stage_rules
from megabagel.checkpoint.names import export_shard
from megabagel.training.loop import Trainer

Held = dict[str, tuple[int, float]]  # released name -> (tensor-parallel rank whose shard it is, squared norm)


def reduced_gradients(trainer: Trainer) -> dict[str, tuple[Tensor, int | None]]:
    """This rank's shards, float32, and the dimension that tensor parallelism splits (None: whole)."""
    shards = {}
    for chunk in trainer.stages:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            for bucket in buffer.buckets:
                _complete(bucket.grad_data, buffer.data_parallel_group)
        rules = stage_rules(chunk.module)
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad:
                shards |= export_shard(parameter.main_grad.clone(), rules[name])
    return shards


def held_norms(trainer: Trainer) -> Held:
    """This rank's part of the norm of every gradient; collective over data-parallel ranks."""
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    return {
        name: (0 if dim is None else tp_rank, shard.square().sum().item())
        for name, (shard, dim) in reduced_gradients(trainer).items()
    }


def whole_norms(ranks: list[Held]) -> dict[str, list[float]]:
    """Norm of every gradient; two values, the smallest and the largest that copies of its shards allow."""
    copies: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for held in ranks:
        for name, (part, squares) in held.items():
            copies[name][part].append(squares)
    return {name: [sum(map(f, parts.values())) ** 0.5 for f in (min, max)] for name, parts in copies.items()}


def _complete(gradient: Tensor, group: dist.ProcessGroup) -> None:
    """Fill a bucket of which the distributed optimizer's reduction has completed this rank's shard only."""
    shard = gradient.chunk(group.size())[group.rank()].clone()
    dist.all_gather_into_tensor(gradient, shard, group=group)
