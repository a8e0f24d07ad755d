"""A checkpoint of ours seen under the released tensor names: what `convert_dist_to_hf` writes and `init_from` reads.

It joins the name map (`names.py`) with the reader of single tensors (`torch_dist.py`); it writes nothing.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megabagel.checkpoint.ema import PREFIX as EMA
from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.names import Rule, export_shard, rule_for
from megabagel.checkpoint.torch_dist import TorchDist, checkpoint_folder
from megabagel.config.schema import ModelConfig

_LAYERS = re.compile(r"decoder\.layers\.((?:und|gen)\..+)")


@dataclass(frozen=True)
class Stored:
    """One parameter in the checkpoint: `key`, and which entry of it where layers are stacked."""

    key: str
    layer: int | None
    rule: Rule


def stored_parameters(tensors: TorchDist, model: ModelConfig, prefix: str = "") -> list[Stored]:
    """Every parameter whose key begins with `prefix` ("" for the weights, `ema.PREFIX` for the average).

    Raises CheckpointError for sparse experts, which no released model has.
    """
    found = []
    for key in tensors.shapes:
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name.startswith(("optimizer.", EMA)):
            continue
        if ".experts." in name or ".router." in name:
            raise CheckpointError(
                f"checkpoint {tensors.source} has sparse experts ({key}), which the released layout has no names for"
            )
        stacked = _LAYERS.fullmatch(name)
        if stacked is None:
            found.append(Stored(key, None, rule_for(name, tensors.shapes[key], 0, 1, model)))
            continue
        layers, *shape = tensors.shapes[key]
        found += [
            Stored(key, layer, rule_for(f"decoder.layers.{layer}.{stacked[1]}", shape, 0, 1, model))
            for layer in range(layers)
        ]
    return found


class TorchDistSource:
    """A `names.Source` over a run or checkpoint folder of ours.

    `weights`: "ema" reads the moving average, and the weights themselves where there is none (frozen parameters).
    """

    def __init__(self, path: str | Path, model: ModelConfig, weights: str = "model"):
        self.folder = checkpoint_folder(path)
        self._tensors = TorchDist(self.folder)
        self.stored = {
            (stored.rule.names): stored
            for prefix in ("", EMA)[: 2 if weights == "ema" else 1]  # the average replaces what it has
            for stored in stored_parameters(self._tensors, model, prefix)
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
        value = self._tensors.read(stored.key, stored.layer)
        return {name: part for name, (part, _) in export_shard(value, stored.rule).items()}

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> Tensor:
        """See `names.Source`."""
        found = self.shape(name)
        if found != shape:
            raise CheckpointError(
                f"tensor {name} in {self.folder} has shape {list(found)}, but the configured model expects "
                f"{list(shape)}; use the model settings that it was saved with"
            )
        whole = self.export(self._by_name[name])[name]
        return whole if dim is None else whole.narrow(dim, start, stop - start)
