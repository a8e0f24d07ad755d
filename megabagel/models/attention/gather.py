"""Gather of rows that may repeat, with a backward pass that is deterministic and adds without atomics.

Built once per packed sequence, used by every layer.
"""

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class RowGather:
    """x [n, ...] -> x[rows] for `rows` int64 [m] that name each of the n rows at least once.

    The gradient of a row sums its copies in rounds: the first copy of every row, then the second of those that have
    one, and so on; no round writes a row twice.
    """

    def __init__(self, rows: np.ndarray, device: torch.device):
        by_row = np.argsort(rows, kind="stable")  # places of the copies, row after row
        counts = np.bincount(rows)
        ends = np.cumsum(counts)
        nth = np.arange(rows.size) - np.repeat(ends - counts, counts)
        by_nth = by_row[np.argsort(nth, kind="stable")]
        rounds = np.split(by_nth, np.cumsum(np.bincount(nth))[:-1])
        self.rows = torch.from_numpy(rows).to(device)
        self.first = torch.from_numpy(rounds[0]).to(device)
        self.repeats = [tuple(torch.from_numpy(t).to(device) for t in (rows[places], places)) for places in rounds[1:]]

    def __call__(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gather: RowGather) -> Tensor:
        ctx.gather = gather
        return x.index_select(0, gather.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        gather = ctx.gather
        total = grad.index_select(0, gather.first)
        if gather.repeats:  # in bfloat16 a long sum would lose its small terms
            total = total.to(torch.promote_types(grad.dtype, torch.float32))
        for rows, places in gather.repeats:
            total.index_add_(0, rows, grad.index_select(0, places).to(total.dtype))
        return total.to(grad.dtype), None
