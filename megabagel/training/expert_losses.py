"""The auxiliary losses of sparse experts over a step: their weight before it, their means for the log after it.

They are means over the packs of the global step. What they are is `models/expert_router.py`'s matter.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import nn

from megabagel.config.schema import ModelConfig
from megabagel.models.expert_router import PackRouter


@dataclass(frozen=True)
class ExpertLosses:
    """Means over the packs of a step, summed over layers and streams, without coefficients; None without experts."""

    balance: float | None  # 1 per layer and sparse stream when all experts are used alike
    z: float | None


def set_auxiliary_loss_scale(packs: int, device: torch.device) -> None:
    """Let every pack's auxiliary losses count 1/`packs` in the backward passes that follow.

    `packs`: of the whole step, over all micro-batches and data-parallel ranks.
    """
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1 / packs, device=device))


def take_expert_losses(
    stages: Iterable[nn.Module], model: ModelConfig, packs: int, device: torch.device
) -> ExpertLosses:
    """The losses measured in the `packs` packs since the last call, equal on all ranks; every rank must call it."""
    if not model.has_sparse_experts:
        return ExpertLosses(None, None)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, PackRouter) and (measured := module.take_measured()) is not None:
                total += measured
    dist.all_reduce(total)  # ranks measure different rows, layers and packs
    balance, z = (total / packs).tolist()
    return ExpertLosses(balance, z)
