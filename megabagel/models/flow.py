"""Rectified flow on latent tokens (Liu et al. 2022): times, points on the path with their targets, time embedding.

No parallelism, no weights except those of the time embedder; the arithmetic of a step is in `ops/flow.py`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megabagel.config.schema import ModelConfig
from megabagel.ops.flow import flow_mix
from megabagel.packing.plan import PackPlan


class FlowTokens(NamedTuple):
    """Of some latent tokens, n of them."""

    times: Tensor  # [n] float32
    noised: Tensor  # [n, d] parameter dtype, the point on the path at that time
    target: Tensor | None = None  # [n, d] float32, what the model should predict: noise - x0; None: nothing is trained


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] with more weight on noise where `shift` > 1: s*t / (1 + (s-1)*t)."""
    return shift * t / (1 + (shift - 1) * t)


def flow_times(raw: Tensor, shift: float) -> Tensor:
    """Raw N(0,1) draws [n] (-inf: clean) -> times in [0, 1), float32: sigmoid, then `shift_times`."""
    return shift_times(torch.sigmoid(raw.float()), shift)


def flow_tokens(
    plan: PackPlan, part: slice, latents: Tensor, noise: Tensor, model: ModelConfig, dtype: torch.dtype
) -> FlowTokens:
    """Tokens `part` of a pack, on the device of its latents [G * d] and noise [G, d], see `StreamInputs`."""
    times = flow_times(plan.timesteps, model.timestep_shift)
    noised, target = flow_mix(latents, plan.latent_grids, noise, times, model.latent_patch_size, dtype)
    return FlowTokens(times[part], noised[part], target[part])


class TimestepEmbedder(nn.Module):
    """Sinusoid of 256 channels (cosines first, longest period 1e4), then Linear-SiLU-Linear."""

    channels = 256

    def __init__(self, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.channels, hidden_size, dtype=dtype),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size, dtype=dtype),
        )

    def forward(self, times: Tensor) -> Tensor:
        """float32 [n] -> [n, hidden]."""
        half = self.channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=times.device) / half
        angle = times[:, None] * torch.exp(-math.log(10000) * steps)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].weight.dtype))
