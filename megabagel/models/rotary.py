"""Rotary position embedding at explicit positions (Su et al. 2021): the table; `ops/kv_gather.py` applies it.

megatron-core's own table assumes positions 0..s-1; here an image shares one position and samples restart at 0.
"""

import torch
from torch import Tensor


def rotary_table(position_ids: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """int64 [s] -> cos, sin, each float32 [s, head_dim / 2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angle = position_ids[:, None].float() * (1.0 / base**exponent)
    return angle.cos(), angle.sin()
