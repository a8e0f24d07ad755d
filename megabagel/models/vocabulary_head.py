"""The vocabulary projection and its cross-entropy, a chunk of rows at a time, each rank with its share of the classes.

The logits of all rows never exist at once. Those of a chunk are replaced by their gradient, which goes through both
matrix products of the backward pass right away: nothing is computed twice, and row weights must be known here.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabagel.ops.cross_entropy import cross_entropy_gradient_, cross_entropy_statistics

_ROWS_AT_ONCE = 16384  # of a gradient that changes its dtype on the way: bounds what is held in both


def vocabulary_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    group: dist.ProcessGroup | None,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy of hidden @ weight.T, summed with weights, and of each row.

    hidden [n, h], the same on all ranks of `group`; weight [classes / ranks, h], this rank's; labels int64 [n];
    row_weights float32 [n]. -> ([], [n]), float32 (float64 for float64 inputs). The sum is differentiable in hidden and
    weight; the gradient of hidden is this rank's part: the caller adds it up over `group`. Rows carry no gradient.
    Raises ValueError where a label on the CPU is no class.
    """
    shards = 1 if group is None else group.size()
    classes = weight.shape[0] * shards
    if labels.device.type == "cpu" and labels.numel():
        least, most = labels.min().item(), labels.max().item()
        if least < 0 or most >= classes:
            raise ValueError(
                f"labels lie in {least} .. {most}, but must lie in 0 .. {classes - 1}, the head's classes."
            )
    # asked here, because inside an autograd function gradients are always off
    with_gradient = torch.is_grad_enabled()
    return _ChunkedLoss.apply(hidden, weight, labels, row_weights, group, chunk_rows, with_gradient)


class _ChunkedLoss(torch.autograd.Function):
    """Gradients of the weighted sum are complete after the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, row_weights, group, chunk_rows, with_gradient):
        rows, many_chunks = hidden.shape[0], hidden.shape[0] > chunk_rows
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        of_hidden = of_weight = None
        if with_gradient and ctx.needs_input_grad[0]:
            of_hidden = torch.empty_like(hidden)
        if with_gradient and ctx.needs_input_grad[1]:
            of_weight = torch.zeros_like(weight, dtype=exact if many_chunks else weight.dtype)
        losses = torch.empty(rows, dtype=exact, device=hidden.device)
        row_weights = row_weights.to(exact)
        labels = labels if group is None else labels - group.rank() * weight.shape[0]
        for begin in range(0, rows, chunk_rows):
            part = slice(begin, min(begin + chunk_rows, rows))
            logits = hidden[part] @ weight.t()  # [rows of the chunk, classes / ranks]
            log_normalizer, picked = _over_shards(cross_entropy_statistics(logits, labels[part]), group)
            torch.sub(log_normalizer, picked, out=losses[part])
            if of_hidden is not None or of_weight is not None:
                cross_entropy_gradient_(logits, labels[part], log_normalizer, row_weights[part])
            if of_hidden is not None:
                torch.mm(logits, weight, out=of_hidden[part])
            if of_weight is not None:
                _add_product(of_weight, logits, hidden[part])
            del logits  # before the next chunk's are made
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * row_weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, _):
        gradients = (_scaled(g, scale, dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *gradients, None, None, None, None, None


def _over_shards(statistics: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Statistics [3, n] of this rank's classes -> log of the sum of exp(logit) and the label's logit over all, [n]."""
    if group is None or group.size() == 1:
        maximum, sums, picked = statistics
        return maximum + sums.log(), picked
    shards = statistics.new_empty(group.size(), *statistics.shape)
    dist.all_gather_into_tensor(shards.view(-1, *statistics.shape[1:]), statistics, group=group)
    maxima, sums, picked = shards.unbind(1)  # [ranks, n] each
    maximum = maxima.amax(dim=0)
    return maximum + (sums * (maxima - maximum).exp()).sum(dim=0).log(), picked.sum(dim=0)


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total [classes, h] += gradient [n, classes].T @ hidden [n, h]; a total more exact than its terms in pieces."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), hidden)
        return
    for of_total, of_gradient in zip(total.split(_ROWS_AT_ONCE), gradient.split(_ROWS_AT_ONCE, dim=1), strict=True):
        of_total.add_(of_gradient.t() @ hidden)


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """gradient [n, h] * scale [] with the exactness of `scale`, in `dtype`; not in place: it may be asked for again."""
    if gradient is None:
        return None
    out = torch.empty_like(gradient, dtype=dtype)
    for of_out, of_gradient in zip(out.split(_ROWS_AT_ONCE), gradient.split(_ROWS_AT_ONCE), strict=True):
        of_out.copy_(of_gradient.to(scale.dtype) * scale)
    return out


class VocabularyHead(ColumnParallelLinear):
    """The parameter of megatron-core's vocabulary projection, split by classes; called with labels, it gives losses.

    It is called as a module so that the hooks that bring parameters up to date run.
    """

    def forward(
        self, hidden: Tensor, labels: Tensor, row_weights: Tensor, chunk_rows: int, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `vocabulary_loss`; `weight`: that of a tied embedding instead of its own."""
        return vocabulary_loss(
            hidden, self.weight if weight is None else weight, labels, row_weights, self.tp_group, chunk_rows
        )
