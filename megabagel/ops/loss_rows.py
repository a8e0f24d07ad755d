"""The rows that carry a loss, taken out of a stream before the heads; their gradient goes back to its rows.

Which rows carry a loss is the plan's matter, what is computed on them the heads'.
"""

import torch
from torch import Tensor

from megabagel.ops import library


def loss_row_gather_reference(x: Tensor, rows: Tensor) -> Tensor:
    """The same with PyTorch's functions."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[rows]


def loss_row_gather(x: Tensor, rows: Tensor) -> Tensor:
    """x [R, ...], rows int64 [N] -> [N, ...]: rows of x, zeros where `rows` is -1, which keeps x in the graph.

    The others must increase. The gradient is exact and the same on any number of threads: each row of it has one term.
    Raises RuntimeError on the CPU for any other entry; on CUDA one that is out of range gives zeros.
    """
    if not library.has_kernel("loss_row_gather", x):
        return loss_row_gather_reference(x, rows)
    return torch.ops.megabagel.loss_row_gather(x, rows)


def _setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, rows = inputs
    ctx.save_for_backward(rows)
    ctx.count = x.shape[0]


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (rows,) = ctx.saved_tensors
    return torch.ops.megabagel.loss_row_scatter(grad, rows, ctx.count), None


if library.LOADED:
    torch.library.register_autograd("megabagel::loss_row_gather", _backward, setup_context=_setup_context)
    torch.library.register_fake("megabagel::loss_row_gather", lambda x, rows: x.new_empty(rows.shape[0], *x.shape[1:]))
    torch.library.register_fake(
        "megabagel::loss_row_scatter", lambda grad, rows, count: grad.new_empty(count, *grad.shape[1:])
    )
