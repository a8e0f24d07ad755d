"""RMSNorm whose weight knows about sequence parallelism.

megatron-core's own fallback norm refuses sequence parallelism without Transformer Engine; this one runs everywhere.
"""

import torch
from torch import Tensor, nn

from megabagel.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, sequence_parallel: bool = False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        # megatron-core sums the gradients of weights with this mark over the tensor-parallel ranks
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class HeadNorm(nn.Module):
    """The weight of an RMSNorm that a fused operator applies. It must be called for it: gathering parameters while the
    forward pass runs begins with a hook on the call."""

    def __init__(self, size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self) -> Tensor:
        """-> [size]."""
        return self.weight
