"""Whether a run's first checkpoint will find room: asked when the run starts, for its first save may be hours away.

Every save asks again (`folder.begin`), with the exact size.
"""

from pathlib import Path

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megabagel.checkpoint import folder
from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.optimizer import MOMENTS, parts, trainable

_FLOAT32 = 4  # bytes


def check(run_dir: str | Path, optimizer: MegatronOptimizer, has_average: bool) -> None:
    """Raise CheckpointError on all ranks when what trains alone takes more than is free in `run_dir`."""
    copies = 1 + len(MOMENTS) + has_average  # main parameters and what has their shape
    mains = [p for part in parts(optimizer) for group in part.optimizer.param_groups for p in group["params"]]
    width = max((p.element_size() for p in trainable(optimizer)), default=0)
    sizes = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, sum(p.numel() for p in mains) * (copies * _FLOAT32 + width))
    outcome = [folder.shortage(run_dir, "a checkpoint", sum(sizes)) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise CheckpointError(outcome[0])
