"""One view of everything that holds weights: a run's checkpoint, a BAGEL folder, a safetensors file.

For looking, not for training: names with shapes and dtypes at once, contents tensor by tensor.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import yaml
from megatron.core import dist_checkpointing
from torch import Tensor

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.export_plan import read_config
from megabagel.checkpoint.folder import manifest, metrics_of
from megabagel.checkpoint.released import TorchDistSource
from megabagel.checkpoint.sources import SafetensorsFolder
from megabagel.checkpoint.torch_dist import TorchDist, checkpoint_folder
from megabagel.config.errors import ConfigError
from megabagel.config.folder import is_checkpoint, read_model_config
from megabagel.config.load import to_yaml
from megabagel.config.schema import Config, ModelConfig

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Contents(Protocol):
    """`facts`: what is known besides tensors, name -> text. `settings`: the configuration as YAML, if there is one."""

    facts: dict[str, str]
    settings: str | None
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> Tensor: ...


def open_contents(path: str | Path, weights: str | None = None) -> Contents:
    """What is at `path`. `weights` (ema or model): a checkpoint's tensors under the released names instead of all its
    own, and which file of a BAGEL folder. Raises CheckpointError where nothing of the three is there."""
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return _Released(SafetensorsFolder(path.parent, (path.stem,)), {"kind": "safetensors file"})
    if folder := checkpoint_at(path):
        return _Own(folder) if weights is None else _translated(folder, weights)
    if path.is_dir():
        stems = ("ema", "model") if weights is None else (weights, "ema", "model")
        return _bagel(path, SafetensorsFolder(path, stems))
    raise CheckpointError(f"{path} is no checkpoint, BAGEL folder or .safetensors file")


def checkpoint_at(path: str | Path) -> Path | None:
    """The checkpoint folder that `path` stands for; None where something else is. Raises CheckpointError if damaged."""
    path = Path(path)
    is_one = is_checkpoint(path) or (path.is_dir() and any(path.glob("iter_*")))
    return checkpoint_folder(path) if is_one else None


@dataclass
class _Released:
    """A folder or file of safetensors, or a checkpoint under the same names."""

    source: SafetensorsFolder | TorchDistSource
    facts: dict[str, str]
    settings: str | None = None
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
        config = read_config(folder)
        self.facts, self.settings = _facts(folder, config), to_yaml(config)
        self.shapes, self.dtypes = self._tensors.shapes, self._tensors.dtypes

    def read(self, name: str) -> Tensor:
        return self._tensors.read(name)


def _translated(folder: Path, weights: str) -> _Released:
    config = read_config(folder)
    return _Released(TorchDistSource(folder, config.model, weights), _facts(folder, config), to_yaml(config))


def _bagel(path: Path, source: SafetensorsFolder) -> _Released:
    """A folder of weights; what model they are of, where its JSON files say so."""
    facts = {"kind": f"BAGEL folder {path}", "files": _sizes(path.glob("*.safetensors"))}
    try:
        model = read_model_config(str(path), ModelConfig())
    except ConfigError:
        return _Released(source, facts)
    settings = {"model": yaml.safe_load(to_yaml(Config(model)))["model"]}
    return _Released(source, facts | {"model": _summary(model)}, yaml.safe_dump(settings, sort_keys=False))


def _facts(folder: Path, config: Config) -> dict[str, str]:
    run = dist_checkpointing.load_common_state_dict(str(folder))["run"]
    metrics = ", ".join(f"{name} {value:.6g}" for name, value in metrics_of(folder).items())
    checked = all(record.crc32 is not None for record in manifest(folder).values())
    sizes = zip(("tensor", "context", "expert", "pipeline", "data"), run["layout"], strict=True)
    return {
        "kind": f"checkpoint {folder}",
        "step": str(run["step"]),
        **{name: f"{value:,}" for name, value in run["counters"].items()},
        "layout": ", ".join(f"{name} {size}" for name, size in sizes),
        "model": _summary(config.model),
        "precision": config.training.params_dtype,
        "files": _sizes(folder / name for name in manifest(folder)) + (", with checksums" if checked else ""),
        **({"metrics": metrics} if metrics else {}),
    }


def _summary(model: ModelConfig) -> str:
    experts = {"und": model.und_num_experts, "gen": model.gen_num_experts}
    sparse = "".join(f", {number} {stream} experts" for stream, number in experts.items() if number is not None)
    return f"{model.layer_variant}, {model.num_layers} layers of {model.hidden_size}{sparse}"


def _sizes(paths: Iterable[Path]) -> str:
    sizes = [path.stat().st_size for path in paths]
    return f"{len(sizes):,} with {sum(sizes) / 1e9:.3f} GB"


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
