"""Fixed two-dimensional sine-cosine position tables; computed, never stored in a run's checkpoint.

Source: the MAE recipe as BAGEL uses it, in which the first half of the channels encodes the column.
"""

import torch
from torch import Tensor


def _sincos(positions: Tensor, channels: int) -> Tensor:
    omega = 1.0 / 10000 ** (torch.arange(channels // 2, dtype=torch.float64) / (channels / 2))
    angle = positions[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_table(side: int, channels: int) -> Tensor:
    """Table of a side x side grid: float32 [side * side, channels], row-major; channels divisible by 4."""
    index = torch.arange(side * side, dtype=torch.float64)
    column, row = index % side, index // side
    return torch.cat([_sincos(column, channels // 2), _sincos(row, channels // 2)], dim=1).float()
