"""The distributed optimizer in a checkpoint: what this rank holds of each parameter's state, and the step count.

A rank may have one optimizer or several (experts have their own): a checkpoint does not tell, so any layout loads it.
Rates, betas, eps and decay belong to the configuration and are not saved.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

PREFIX = "optimizer.state."
MAIN, MOMENTS = "param", ("exp_avg", "exp_avg_sq")
STATES = (MAIN, *MOMENTS)  # `optimizer.state.<one of these>.<key of the parameter>`


@dataclass(frozen=True)
class Shard:
    """The elements from `start` on of the flattened `parameter` that this rank keeps the state of; all are 1-D."""

    parameter: Tensor
    start: int
    states: dict[str, Tensor]  # by STATES


def steps_done(optimizer: MegatronOptimizer) -> int:
    """Updates that Adam's bias correction has counted."""
    return max((int(group["step"]) for group in optimizer.param_groups if "step" in group), default=0)


def set_steps_done(optimizer: MegatronOptimizer, steps: int) -> None:
    """Go on counting from `steps`."""
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            group["step"] = steps


def parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers that this rank's parameters have: one, or another one for experts."""
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


def trainable(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Parameters whose state this rank or its data-parallel siblings hold."""
    return [p for part in parts(optimizer) for buffer in part.buffers for p in buffer.param_index_map]


def shards(optimizer: MegatronOptimizer) -> Iterator[Shard]:
    """Views of all that this rank holds; moments that no step has made yet are made, as zeros."""
    for part in parts(optimizer):
        for parameter, (group, order) in part.model_param_group_index_map.items():
            main = part.optimizer.param_groups[group]["params"][order]
            state = part.optimizer.state[main]
            for name in MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(main, dtype=torch.float32)
            start = part._get_model_param_range_map(parameter)["param"].start
            moments = {name: state[name].detach().view(-1) for name in MOMENTS}
            yield Shard(parameter, start, {MAIN: main.detach().view(-1), **moments})
