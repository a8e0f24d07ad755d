"""A checkpoint of ours seen under the released tensor names: what `convert_dist_to_hf` writes and `init_from` reads.

It joins the name map (`names.py`) with the reader of single tensors (`torch_dist.py`); it writes nothing.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megabagel.checkpoint.ema import PREFIX as EMA
from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.names import Rule, export_shard, rule_for
from megabagel.checkpoint.pieces import Piece
from megabagel.checkpoint.torch_dist import TorchDist, checkpoint_folder
from megabagel.config.schema import ModelConfig

_LAYERS = re.compile(r"decoder\.layers\.((?:und|gen)\..+)")
_EXPERTS = ".mlp.experts.experts."


@dataclass(frozen=True)
class Stored:
    """One parameter in the checkpoint: `key`, and which part of it where layers, and experts in them, are stacked."""

    key: str
    index: tuple[int, ...]
    rule: Rule


def stored_parameters(shapes: Mapping[str, tuple[int, ...]], model: ModelConfig, prefix: str = "") -> list[Stored]:
    """Every parameter whose key begins with `prefix` ("" for the weights, `ema.PREFIX` for the average).

    `shapes`: of the whole tensors, by key.
    """
    found = []
    for key, whole in shapes.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name.startswith(("optimizer.", EMA)):
            continue
        stacked = 0 if not _LAYERS.fullmatch(name) else 2 if _EXPERTS in name else 1
        for index in itertools.product(*map(range, whole[:stacked])):
            rule = rule_for(_parameter(name, index), whole[stacked:], 0, 1, model)
            found.append(Stored(key, index, rule))
    return found


def _parameter(name: str, index: tuple[int, ...]) -> str:
    """What an unsplit model calls the part `index` of the tensor `name`."""
    if not index:
        return name
    layer, *expert = index
    name = f"decoder.layers.{layer}.{_LAYERS.fullmatch(name)[1]}"
    return name.replace(_EXPERTS, f".mlp.experts.local_experts.{expert[0]}.") if expert else name


class TorchDistSource:
    """A `names.Source` over a run or checkpoint folder of ours.

    `weights`: "ema" reads the moving average, and the weights themselves where there is none (frozen parameters).
    """

    def __init__(self, path: str | Path, model: ModelConfig, weights: str = "model"):
        self.folder = checkpoint_folder(path)
        self._tensors = TorchDist(self.folder)
        self.stored = {
            stored.rule.names: stored
            for prefix in ("", EMA)[: 2 if weights == "ema" else 1]  # the average replaces what it has
            for stored in stored_parameters(self._tensors.shapes, model, prefix)
        }
        self._by_name = {name: stored for names, stored in self.stored.items() for name in names}

    def close(self) -> None: ...

    def names(self) -> set[str]:
        return set(self._by_name)

    def holds(self, name: str) -> bool:
        return name in self._by_name

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError when there is no such tensor."""
        if name not in self._by_name:
            raise CheckpointError(f"checkpoint {self.folder} has no tensor {name}, which the configured model needs")
        rule = self._by_name[name].rule
        return rule.shapes[rule.names.index(name)]

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtypes[self._by_name[name].key]

    def stored_as(self, name: str) -> Stored:
        """The parameter that a released tensor is part of."""
        return self._by_name[name]

    def export(self, stored: Stored) -> dict[str, Tensor]:
        """Released name -> whole tensor, of one parameter."""
        value = self._tensors.read(stored.key, stored.index)
        return {name: part for name, (part, _) in export_shard(value, stored.rule).items()}

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> Tensor:
        """See `names.Source`."""
        found = self.shape(name)
        if found != shape:
            raise CheckpointError(
                f"tensor {name} in {self.folder} has shape {list(found)}, but the configured model expects "
                f"{list(shape)}; use the model settings that it was saved with"
            )
        rows = (start, stop) if dim == 0 else (0, shape[0])
        lengths = [rows[1] - rows[0], *shape[1:]]
        if dim == 1:
            lengths[1] = stop - start
        out = torch.empty(lengths, dtype=self.dtype(name))
        self._tensors.read_into(self._pieces(name, out, rows[0], start if dim == 1 else 0))
        return out

    def _pieces(self, name: str, out: Tensor, row: int, column: int) -> Iterator[Piece]:
        """The rectangles of a stored parameter that make up `out`, the part of a released tensor from (row, column) on.

        Each block of the parameter's rows has some of the released tensor's.
        """
        stored = self._by_name[name]
        rule, place = stored.rule, stored.rule.names.index(name)
        heights = [shape[0] // rule.blocks for shape in rule.shapes]
        for block in range(rule.blocks):
            first = block * heights[place]  # row of the released tensor with which its part of the block begins
            low, high = max(row, first), min(row + len(out), first + heights[place])
            if low < high:
                offsets = [block * sum(heights) + sum(heights[:place]) + low - first, column, *[0] * out.dim()]
                data = out[low - row : high - row][(None,) * len(stored.index)]
                yield Piece(stored.key, self._tensors.shapes[stored.key], (*stored.index, *offsets[: out.dim()]), data)
