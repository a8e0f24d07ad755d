"""What an export writes: which tensors, of what type, in which files, after which folder.

The folder looks like `base`, the one that the run began with: its names, dtypes and division into files, headers byte
by byte where nothing in them changes. Without one it looks like the release: a single file of weights.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from megabagel.checkpoint.bagel_folder import STEMS, BagelFolder, stems_in
from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.released import TorchDistSource
from megabagel.checkpoint.safetensors_file import SafetensorsFile, Spec, divide, make_head
from megabagel.checkpoint.torch_dist import checkpoint_folder
from megabagel.config.folder import CARRIED, LATENT_TABLE, VIT_TABLE, is_checkpoint, side_folder
from megabagel.config.load import saved_config
from megabagel.config.schema import Config, ModelConfig


def read_config(checkpoint: Path) -> Config:
    """The configuration of the run that wrote `checkpoint` (a checkpoint folder)."""
    return saved_config(dist_checkpointing.load_common_state_dict(str(checkpoint))["run"]["config_yaml"])


@dataclass(frozen=True)
class Plan:
    """What is written where."""

    checkpoint: Path
    model: ModelConfig
    weights: tuple[str, ...]  # ema, model or both
    base: Path | None
    out: Path
    files: dict[str, bytes]  # name -> length and header, see `safetensors_file`
    weights_of: dict[str, str]  # the same names -> ema or model

    def open(self) -> dict[str, SafetensorsFile]:
        """The files to write, by name."""
        return {name: SafetensorsFile(self.out / name, head) for name, head in self.files.items()}

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for file in self.open().values() for spec in file.specs.values())

    def base_folder(self, weights: str) -> BagelFolder | None:
        """The base folder, if it has weights."""
        if self.base is None or not stems_in(self.base):
            return None
        return BagelFolder(self.base, (weights, *STEMS))


def plan_export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    weights: str | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int | None = None,
) -> Plan:
    """Which tensors go into which files.

    `weights`: ema, model or both; None: what the BAGEL folder had that the checkpoint was made of, else ema. `base`:
    None: what the run began with. `dtype`: of all tensors; None: as in `base`, else as the run computed.

    Raises CheckpointError where the checkpoint cannot be read, or `base` is the folder of another model.
    """
    source_folder = checkpoint_folder(checkpoint)
    config = read_config(source_folder)
    if config.model.has_sparse_experts:
        raise CheckpointError(
            f"checkpoint {source_folder} has sparse experts, which a BAGEL folder has no names for; train on from it "
            "with checkpoint.init_from"
        )
    base = Path(base) if base else _base_of(source_folder, config)
    carried = stems_in(source_folder / CARRIED)
    if weights is None:
        weights = "both" if len(carried) == 2 else (*carried, "ema")[0]
    chosen = STEMS if weights == "both" else (weights,)
    plan = Plan(source_folder, config.model, chosen, base, Path(out), {}, {})
    own = torch.float32 if config.training.params_dtype == "fp32" else torch.bfloat16
    for of in chosen:
        released = plan.base_folder(of)
        specs = _specs(TorchDistSource(source_folder, config.model, of), released, config.model, dtype, own)
        heads = _divide(specs, of, released, max_file_bytes)
        plan.files.update(heads)
        plan.weights_of.update(dict.fromkeys(heads, of))
    if len(plan.files) < len(chosen):
        raise CheckpointError(f"{base} has the same files for ema and model weights: export one of them (--weights)")
    return plan


def _base_of(checkpoint: Path, config: Config) -> Path | None:
    """What the checkpoint carries, else the folder that the run's weights came from, or what that one carries."""
    for path in (checkpoint, config.checkpoint.init_from):
        side = Path(side_folder(str(path))) if path else None
        if side and side.is_dir() and not is_checkpoint(side):
            return side
    return None


def _specs(
    source: TorchDistSource,
    released: BagelFolder | None,
    model: ModelConfig,
    dtype: torch.dtype | None,
    own: torch.dtype,
) -> dict[str, Spec]:
    names = released.names() if released else {*source.names(), *tables(model)}
    specs = {}
    for name in sorted(names):
        found = dtype or (released.spec(name).dtype if released else own)
        specs[name] = Spec(_shape(name, source, released, model), found)
    missing = sorted(source.names() - set(specs))
    if missing:
        raise CheckpointError(
            f"{released.folder} does not have the tensor {missing[0]} ({len(missing)} in all), which the checkpoint "
            "has; it is the folder of another model: leave --base out or name the folder that the run began with"
        )
    return specs


def tables(model: ModelConfig) -> dict[str, int]:
    """Fixed position tables that the released weights carry: name -> side."""
    sides = {LATENT_TABLE: model.max_latent_size} if model.visual_gen else {}
    return sides | ({VIT_TABLE: model.vit.max_num_patch_per_side} if model.visual_und else {})


def _shape(name: str, source: TorchDistSource, released: BagelFolder | None, model: ModelConfig) -> tuple[int, ...]:
    if source.holds(name):
        shape = source.shape(name)
        if released and released.shape(name) != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(shape)} in the checkpoint and {list(released.shape(name))} in "
                f"{released.folder}; name the folder that the run began with"
            )
        return shape
    return released.shape(name) if released else (tables(model)[name] ** 2, model.hidden_size)


def _divide(
    specs: dict[str, Spec], weights: str, released: BagelFolder | None, max_file_bytes: int | None
) -> dict[str, bytes]:
    """Headers by file: those of `released` as they are, where nothing in them changes; or by size; or all in one."""
    if released is None and max_file_bytes is None:
        return {f"{weights}.safetensors": make_head(specs)}
    if max_file_bytes is None:
        whole = len(released.files) == 1
        return {
            f"{weights}.safetensors" if whole else name: _head(file, {tensor: specs[tensor] for tensor in file.specs})
            for name, file in released.files.items()
        }
    parts = divide(specs, max_file_bytes)
    count = len(parts)
    return {f"{weights}-{i:05d}-of-{count:05d}.safetensors": make_head(part) for i, part in enumerate(parts, 1)}


def _head(file: SafetensorsFile, specs: dict[str, Spec]) -> bytes:
    return file.head if specs == file.specs else make_head(dict(sorted(specs.items())))
