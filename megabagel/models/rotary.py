"""Rotary position embedding at explicit positions (rotate-half form of Qwen2; Su et al. 2021).

megatron-core's own table assumes positions 0..s-1; here an image shares one position and samples restart at 0.
"""

import torch
from torch import Tensor


def rotary_table(position_ids: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """int64 [s] -> cos, sin, each float32 [s, 1, head_dim]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angle = position_ids[:, None].float() * (1.0 / base**exponent)  # [s, head_dim/2]
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """[s, heads, head_dim] rotated by its rows' positions."""
    cos, sin = (t.to(x.dtype) for t in table)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
