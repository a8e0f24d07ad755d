"""Sequence order to padded streams and back: rows of one tensor in the order of another, cast on the way.

`order` [L] names the stream row of each sequence row, every row at most once; `inverse` [R] the sequence row of each
stream row, -1 for padding. Both directions are gathers, and each is the other's gradient.
"""

from torch import Tensor
from torch.nn.functional import pad


def stream_split(x: Tensor, inverse: Tensor, order: Tensor) -> Tensor:
    """[L, ...] -> [R, ...]: row r is x[inverse[r]], zeros for padding."""
    rows = pad(x.flatten(1), (0, 0, 0, 1)).index_select(0, inverse.where(inverse >= 0, len(x)))
    return rows.view(-1, *x.shape[1:])


def stream_merge(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """[R, ...] -> [L, ...]: row i is x[order[i]]."""
    return x.index_select(0, order)
