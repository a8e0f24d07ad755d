"""Sparse experts in plain PyTorch, by their formulas: every expert computes every row. What ours is compared with."""

import torch
from torch import Tensor, nn


def swiglu(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    gate, up = (x @ fc1.T).chunk(2, dim=-1)
    return (nn.functional.silu(gate) * up) @ fc2.T


def sparse_mlp(weights: dict[str, Tensor], x: Tensor, padding: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole weights by their names in `SparseMLP`, rows [rows, hidden], padding [rows] -> output, load balancing, z.

    The losses of a pack of padding rows only are 0.
    """
    logits = x @ weights["router.weight"].T
    experts = logits.shape[1]
    best, chosen = logits.topk(topk)
    probs = torch.zeros_like(logits).scatter(1, chosen, best.softmax(dim=-1))
    out = swiglu(x, weights["shared_experts.linear_fc1.weight"], weights["shared_experts.linear_fc2.weight"])
    for e in range(experts):
        prefix = f"experts.local_experts.{e}.linear_fc"
        out = out + probs[:, e : e + 1] * swiglu(x, weights[f"{prefix}1.weight"], weights[f"{prefix}2.weight"])
    if padding.all():
        return out, logits.new_zeros(()), logits.new_zeros(())
    valid = logits[~padding]
    fraction = nn.functional.one_hot(chosen[~padding], experts).sum(dim=(0, 1)) / chosen[~padding].numel()
    balance = experts * (fraction * valid.softmax(dim=-1).mean(dim=0)).sum()
    return out, balance, valid.logsumexp(dim=-1).square().mean()
