"""Weights that a tool is given, whatever holds them: a BAGEL folder, or a run or checkpoint folder of ours.

It says which model they are of and reads them by their released names; what is made of them is the tools' matter.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.export_plan import read_config
from megabagel.checkpoint.released import TorchDistSource
from megabagel.checkpoint.sources import SafetensorsFolder
from megabagel.checkpoint.torch_dist import checkpoint_folder
from megabagel.config.folder import is_checkpoint, read_model_config
from megabagel.config.paths import tokenizer_path
from megabagel.config.schema import Config, ModelConfig


@dataclass(frozen=True)
class GivenWeights:
    """An opened folder. `config`: of the run that wrote it, None for a BAGEL folder."""

    source: SafetensorsFolder | TorchDistSource
    model: ModelConfig
    config: Config | None

    @property
    def tokenizer(self) -> Path | None:
        """Folder that should hold the tokenizer's files."""
        if self.config is None:
            return self.source.folder
        found = tokenizer_path(self.config)
        return Path(found) if found else None

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is written as: the file's type, of a checkpoint that in which the run computed."""
        if self.config is None:
            return self.source.dtype(name)
        return torch.float32 if self.config.training.params_dtype == "fp32" else torch.bfloat16

    def groups(self, names: set[str]) -> list[tuple[str, ...]]:
        """`names` in groups that `read` reads at once: the parts of one merged parameter."""
        if isinstance(self.source, SafetensorsFolder):
            return [(name,) for name in sorted(names)]
        return [found for group in self.source.stored if (found := tuple(name for name in group if name in names))]

    def read(self, group: tuple[str, ...]) -> dict[str, Tensor]:
        """The whole tensors of one of the `groups`."""
        if isinstance(self.source, SafetensorsFolder):
            return {name: self.source.read(name, self.source.shape(name), None, 0, 0) for name in group}
        tensors = self.source.export(self.source.stored_as(group[0]))
        return {name: tensors[name] for name in group}


def open_weights(path: str | Path, weights: str = "ema") -> GivenWeights:
    """The weights in `path`. `weights`: ema or model; the other is taken where a BAGEL folder lacks it.

    Raises CheckpointError and ConfigError where there are none, or they cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}; give a BAGEL folder, a run folder or an iter_... folder")
    if is_checkpoint(path) or any(path.glob("iter_*")):
        folder = checkpoint_folder(path)
        config = read_config(folder)
        return GivenWeights(TorchDistSource(folder, config.model, weights), config.model, config)
    other = "model" if weights == "ema" else "ema"
    model = read_model_config(str(path), ModelConfig())
    return GivenWeights(SafetensorsFolder(path, (weights, other)), model, None)
