"""One view of everything that holds weights: a run's checkpoint, a BAGEL folder, a safetensors file.

For looking, not for training: names with shapes and dtypes at once, contents tensor by tensor.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.export import read_config
from megabagel.checkpoint.released import TorchDistSource
from megabagel.checkpoint.sources import SafetensorsFolder
from megabagel.checkpoint.torch_dist import TorchDist, checkpoint_folder
from megabagel.config.folder import is_checkpoint

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Contents(Protocol):
    """`facts`: what is known besides tensors, name -> text."""

    facts: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> Tensor: ...


def open_contents(path: str | Path, weights: str | None = None) -> Contents:
    """What is at `path`. `weights` (ema or model): a checkpoint's tensors under the released names instead of all its
    own, and which file of a BAGEL folder. Raises CheckpointError where nothing of the three is there."""
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return _Released(SafetensorsFolder(path.parent, (path.stem,)), {"kind": "safetensors file"})
    if is_checkpoint(path) or (path.is_dir() and any(path.glob("iter_*"))):
        folder = checkpoint_folder(path)
        return _Own(folder) if weights is None else _translated(folder, weights)
    if path.is_dir():
        stems = ("ema", "model") if weights is None else (weights, "ema", "model")
        return _Released(SafetensorsFolder(path, stems), {"kind": "BAGEL folder"})
    raise CheckpointError(f"{path} is no checkpoint, BAGEL folder or .safetensors file")


@dataclass
class _Released:
    """A folder or file of safetensors, or a checkpoint under the same names."""

    source: SafetensorsFolder | TorchDistSource
    facts: dict[str, str]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shapes = {name: self.source.shape(name) for name in sorted(self.source.names())}
        self.dtypes = {name: self.source.dtype(name) for name in self.shapes}

    def read(self, name: str) -> Tensor:
        return self.source.read(name, self.shapes[name], None, 0, 0)


class _Own:
    """A checkpoint under its own keys."""

    def __init__(self, folder: Path):
        self._tensors = TorchDist(folder)
        self.facts = _facts(folder)
        self.shapes, self.dtypes = self._tensors.shapes, self._tensors.dtypes

    def read(self, name: str) -> Tensor:
        return self._tensors.read(name)


def _translated(folder: Path, weights: str) -> _Released:
    return _Released(TorchDistSource(folder, read_config(folder).model, weights), _facts(folder))


def _facts(folder: Path) -> dict[str, str]:
    run = dist_checkpointing.load_common_state_dict(str(folder))["run"]
    config = read_config(folder)
    sizes = zip(("tensor", "context", "expert", "pipeline", "data"), run["layout"], strict=True)
    return {
        "kind": f"checkpoint {folder}",
        "step": str(run["step"]),
        "samples": str(run["counters"].get("samples", "")),
        "layout": ", ".join(f"{name} {size}" for name, size in sizes),
        "model": f"{config.model.layer_variant}, {config.model.num_layers} layers of {config.model.hidden_size}",
        "precision": config.training.params_dtype,
    }


@dataclass(frozen=True)
class Difference:
    """Of two tensors of one name and shape. `largest`: absolute difference; NaN where either holds one alone."""

    name: str
    largest: float
    bit_equal: int
    values: int


def difference(name: str, left: Tensor, right: Tensor) -> Difference:
    """Bit by bit; tensors of unlike dtypes by their values in float64."""
    if left.dtype != right.dtype:
        left, right = left.double(), right.double()
    bits = _BITS[left.element_size()]
    equal = left.contiguous().view(bits) == right.contiguous().view(bits)
    gap = torch.where(equal, 0.0, (left.double() - right.double()).abs())
    return Difference(name, float(gap.max()) if gap.numel() else 0.0, int(equal.sum()), left.numel())
