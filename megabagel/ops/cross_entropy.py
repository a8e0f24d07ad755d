"""Softmax cross-entropy over one shard of the classes: what a loss needs of the logits, then the gradient over them.

Where logits come from, and how shards of the classes are put together, is the caller's matter.
"""

import torch
from torch import Tensor

from megabagel.ops import library


def cross_entropy_statistics_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """The same with PyTorch's functions."""
    values = logits.to(_statistics_type(logits))
    maximum = values.amax(dim=1)
    sums = (values - maximum[:, None]).exp().sum(dim=1)
    here = (labels >= 0) & (labels < logits.shape[1])
    picked = values.gather(1, labels.where(here, 0)[:, None])[:, 0]
    return torch.stack([maximum, sums, picked * here])


def cross_entropy_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [n, classes], labels int64 [n] -> [3, n], float32 (float64 for float64 logits): each row's maximum, its
    sum of exp(logit - maximum), its label's logit. A label outside 0 .. classes - 1 picks 0: another shard has it."""
    if not library.has_kernel("cross_entropy_statistics", logits):
        return cross_entropy_statistics_reference(logits, labels)
    return torch.ops.megabagel.cross_entropy_statistics(logits, labels)


def cross_entropy_gradient_reference_(logits: Tensor, labels: Tensor, log_normalizer: Tensor, weights: Tensor) -> None:
    """The same with PyTorch's functions."""
    gradient = (logits.to(log_normalizer.dtype) - log_normalizer[:, None]).exp()
    here = ((labels >= 0) & (labels < logits.shape[1])).nonzero()[:, 0]
    gradient[here, labels[here]] -= 1
    logits.copy_(gradient * weights[:, None])


def cross_entropy_gradient_(logits: Tensor, labels: Tensor, log_normalizer: Tensor, weights: Tensor) -> None:
    """Write the gradient of sum(weights * loss), (softmax - one-hot of the label) * weight, over logits [n, classes].

    log_normalizer [n] (log of the sum of exp(logit) over all shards) and weights [n] have the statistics' dtype.
    """
    if not library.has_kernel("cross_entropy_gradient_", logits):
        cross_entropy_gradient_reference_(logits, labels, log_normalizer, weights)
    else:
        torch.ops.megabagel.cross_entropy_gradient_(logits, labels, log_normalizer, weights)


def _statistics_type(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


if library.LOADED:
    torch.library.register_fake(
        "megabagel::cross_entropy_statistics",
        lambda logits, labels: logits.new_empty(3, logits.shape[0], dtype=_statistics_type(logits)),
    )
    torch.library.register_fake(
        "megabagel::cross_entropy_gradient_", lambda logits, labels, log_normalizer, weights: None
    )
