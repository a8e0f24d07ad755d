"""How large single gradients and parameters are, by part of the model: counts of base-2 logarithms of magnitudes.

Fixed bins let all ranks add up what each counts in its own shards; one sum over all of them.
"""

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megabagel.training.norms import PARTS, shards

LOW, HIGH = -48, 16
EDGES = np.arange(LOW, HIGH + 1, dtype=np.float64)  # what lies outside, zeros too, counts in the first and last bin
KINDS = ("gradients", "parameters")
Histogram = list[float]  # of HIGH - LOW counts


@torch.no_grad()
def measure(optimizer: MegatronOptimizer, layer_variant: str) -> dict[str, Histogram]:
    """`gradients/PART`, after clipping, and `parameters/PART` by the parts of `norms.py` that train; every rank must
    call it after the update."""
    device = next(optimizer.model_chunks[0].parameters()).device
    counts = torch.zeros(len(KINDS), len(PARTS), HIGH - LOW, dtype=torch.float64, device=device)
    for shard in shards(optimizer, layer_variant):
        place = PARTS.index(shard.part)
        if shard.main.grad is not None:
            counts[0, place] += _count(shard.main.grad)
        counts[1, place] += _count(shard.main)
    dist.all_reduce(counts)
    named = zip(KINDS, counts.tolist(), strict=True)
    return {f"{kind}/{part}": of for kind, parts in named for part, of in zip(PARTS, parts, strict=True) if sum(of)}


def _count(values: Tensor) -> Tensor:
    """float64 [HIGH - LOW]."""
    logarithms = values.float().abs().log2().clamp(LOW, HIGH - 0.5)
    return torch.histc(logarithms, HIGH - LOW, LOW, HIGH).double()
