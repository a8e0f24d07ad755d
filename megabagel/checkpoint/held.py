"""What this rank holds of a run's state, as pieces: those that it writes, and those that it reads.

Optimizer state and moving average are written by the rank that holds them, weights that train from the main
parameters (evenly spread over data-parallel ranks and never rounded twice), everything else in turn.
"""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megabagel.checkpoint import ema as ema_state
from megabagel.checkpoint import optimizer as optimizer_state
from megabagel.checkpoint.ema import Average
from megabagel.checkpoint.local import LocalCheckpoint
from megabagel.checkpoint.pieces import Piece
from megabagel.checkpoint.places import Placed, placed
from megabagel.checkpoint.torch_dist import TorchDist


class Held:
    """Views of the live state of model, optimizer and average (None: without)."""

    def __init__(
        self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, average: Average | None
    ):
        self.chunks = chunks
        self._tensors, self._objects = placed(chunks)
        self._shards = list(optimizer_state.shards(optimizer))
        self._trainable = set(optimizer_state.trainable(optimizer))
        self._by_data = {tensor.data: tensor for tensor in self._tensors}
        self._average = None if average is None else average.by_parameter()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shapes, by key, of all that this rank has a part in."""
        prefixes = [optimizer_state.PREFIX + name + "." for name in optimizer_state.STATES]
        prefixes += [] if self._average is None else [ema_state.PREFIX]
        shapes = {}
        for tensor in self._tensors:
            shapes.update(tensor.shapes())
            if tensor.data in self._trainable:
                for prefix in prefixes:
                    shapes.update(tensor.shapes(prefix))
        return shapes

    def to_write(self) -> list[Piece]:
        """All ranks' pieces together are the whole state, each element once. Nothing is copied but FP8 weights that do
        not train."""
        pieces = []
        for shard in self._shards:
            if self._by_data[shard.parameter].written_here:
                main = shard.states[optimizer_state.MAIN]
                pieces += self._by_data[shard.parameter].pieces(main, shard.start, dtype=shard.parameter.dtype)
                pieces += self._state_pieces(shard)
        bytes_of_ranks: dict[bool, list[int]] = {}  # of experts, and of everything else
        for tensor in self._frozen():
            if not tensor.written_here:
                continue
            loads = bytes_of_ranks.setdefault(tensor.is_expert, [0] * tensor.holders)
            for piece in tensor.pieces(_plain(tensor.data).view(-1), 0):
                idle = loads.index(min(loads))
                loads[idle] += piece.nbytes
                if idle == tensor.replica[-1]:
                    pieces.append(piece)
        return pieces

    def objects_to_write(self) -> dict[str, object]:
        return {entry.key: entry.data for entry in self._objects if entry.written_here}

    def to_keep(self) -> list[Piece]:
        """All that `read` takes on this rank, whoever else has it."""
        pieces = [piece for shard in self._shards for piece in self._state_pieces(shard)]
        for tensor in self._frozen():
            pieces += tensor.pieces(_plain(tensor.data).view(-1), 0)
        return pieces

    def objects_to_keep(self) -> dict[str, object]:
        return {entry.key: entry.data for entry in self._objects}

    def read(self, source: TorchDist | LocalCheckpoint) -> None:
        """Take everything but the weights that train out of a checkpoint: they follow from the main parameters.

        Raises UnreadableError, when some may be overwritten.
        """
        pieces = [piece for shard in self._shards for piece in self._state_pieces(shard)]
        quantized = []
        for tensor in self._frozen():
            values = tensor.data.detach()
            if is_float8tensor(values):
                quantized.append((values, values := torch.empty(values.shape, dtype=values.dtype)))
            pieces += tensor.pieces(values.view(-1), 0)
        source.read_into(pieces)
        for parameter, values in quantized:
            parameter.copy_(values)
        for entry in self._objects:
            if source.has_object(entry.key):
                state = {entry.name: source.read_object(entry.key)}
                self.chunks[entry.chunk].module.load_state_dict(state, strict=False)

    def _state_pieces(self, shard: optimizer_state.Shard) -> list[Piece]:
        tensor, pieces = self._by_data[shard.parameter], []
        for name, values in shard.states.items():
            pieces += tensor.pieces(values, shard.start, f"{optimizer_state.PREFIX}{name}.")
        if self._average is not None:
            pieces += tensor.pieces(self._average[shard.parameter][0].view(-1), shard.start, ema_state.PREFIX)
        return pieces

    def _frozen(self) -> list[Placed]:
        return [tensor for tensor in self._tensors if tensor.data not in self._trainable]


def _plain(tensor: Tensor) -> Tensor:
    return dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor.detach()
