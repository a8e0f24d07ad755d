"""Rectified flow on latent tokens (Liu et al. 2022): times, the point on the path, the target and time embedding.

Functions from tensors to tensors; no parallelism, no weights except those of the time embedder.
"""

import math

import torch
from torch import Tensor, nn


def flow_times(raw: Tensor, shift: float) -> Tensor:
    """Raw N(0,1) draws [n] (-inf: clean) -> times in [0, 1), float32: sigmoid, then s*t / (1 + (s-1)*t)."""
    t = torch.sigmoid(raw.float())
    return shift * t / (1 + (shift - 1) * t)


def interpolate(latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """x_t = (1-t) * x0 + t * noise; latents and noise [n, d], times [n]."""
    t = times[:, None]
    return (1 - t) * latents + t * noise


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """What the model predicts: d x_t / dt = noise - x0."""
    return noise - latents


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
