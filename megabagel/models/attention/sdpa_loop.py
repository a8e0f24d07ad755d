"""Attention as one plain scaled-dot-product call per problem, on any device: simple, differentiable, not fast.

The reference on CUDA, where `varlen` and `flex` are meant for training. It copies keys only behind a noised image.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention


class LoopPlan:
    """A table of problems [P, 5] (see `packing.plan.Problem`), run one by one."""

    def __init__(self, problems: np.ndarray):
        self.problems = problems[np.argsort(problems[:, 0])].tolist()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [L, heads, d], k and v [L, kv heads, d] -> [L, heads, d]."""
        if not self.problems:
            return q + 0
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
        return torch.cat([_attend(q, k, v, *problem) for problem in self.problems])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, start: int, length: int, prefix_start: int, prefix_length: int, causal: int
) -> Tensor:
    """Result [length, heads, d] of one problem; keys and values have as many heads as queries."""
    end, prefix_end = start + length, prefix_start + prefix_length
    if prefix_length and prefix_end != start:
        keys, values = (torch.cat([x[prefix_start:prefix_end], x[start:end]]) for x in (k, v))
    else:
        keys, values = (x[start - prefix_length : end] for x in (k, v))
    mask = causal_lower_right(length, len(keys)) if causal and length > 1 else None
    inputs = (x.transpose(0, 1).unsqueeze(0) for x in (q[start:end], keys, values))
    return scaled_dot_product_attention(*inputs, attn_mask=mask)[0].transpose(0, 1)
