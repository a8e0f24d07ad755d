"""Which rows of a stream carry a loss, for ranks that each hold an equal share of its rows, and how they meet.

Every rank knows everything from the plan: no sizes are exchanged. With one rank all of it is the identity.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn.functional import pad

from megabagel.ops.loss_rows import loss_row_gather
from megabagel.packing.chunk import Chunk


@dataclass(frozen=True)
class SharedRows:
    """Rows of a stream of which each rank holds a share; int64."""

    own: Tensor  # [m] in this rank's share, -1 behind them: m is the largest number that a rank has, and at least 1
    places: Tensor  # [n] of all ranks' rows in the stream's order, among the [ranks * m] of all ranks' `own`

    def gather(self, stream: Tensor, group: dist.ProcessGroup, sharded: bool) -> Tensor:
        """This rank's rows of the stream [rows, h] -> the rows named, [n, h], the same on all ranks of the group.

        Their gradient may be in parts, one per rank; they are added up, and each rank gets that of its rows.
        """
        mine = loss_row_gather(stream, self.own)
        if sharded:
            mine = gather_from_sequence_parallel_region(mine, tensor_parallel_output_grad=True, group=group)
        else:
            mine = copy_to_tensor_model_parallel_region(mine, group)
        return loss_row_gather(mine, self.places)


def share_rows(rows: Tensor, length: int, rank: int, ranks: int) -> SharedRows:
    """`rows` [n] of a stream of `length` rows, increasing, for rank `rank` of `ranks`; all on the CPU."""
    share = length // ranks
    counts = torch.bincount(rows // share, minlength=ranks)
    most = max(int(counts.max()), 1)
    first = counts.cumsum(0) - counts
    number = torch.arange(rows.numel())
    owner = rows // share
    own = rows[owner == rank] - rank * share
    return SharedRows(pad(own, (0, most - own.numel()), value=-1), owner * most + number - first[owner])


@dataclass(frozen=True)
class LossRows:
    """Of this rank's chunk, int64."""

    ce: SharedRows
    mse: Tensor  # [rows of this rank] in its share of the gen stream
    latents: Tensor  # [rows of this rank] the chunk's latent token of each

    def to(self, device: torch.device | str) -> "LossRows":
        """Copy on `device`."""
        ce = SharedRows(self.ce.own.to(device), self.ce.places.to(device))
        return LossRows(ce, self.mse.to(device), self.latents.to(device))


def loss_rows(chunk: Chunk, rank: int, ranks: int) -> LossRows:
    """For rank `rank` of `ranks` that hold equal shares of the chunk's streams; the chunk is on the CPU."""
    share = chunk.gen_length // ranks
    latents = chunk.mse_rows[chunk.mse_rows // share == rank]
    return LossRows(share_rows(chunk.ce_rows, chunk.und_length, rank, ranks), latents - rank * share, latents)
