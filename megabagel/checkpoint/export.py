"""Writes a BAGEL folder from a checkpoint of ours, tensor by tensor: memory is that of a few tensors, not of the model.

The folder looks like `base`, the one that the run began with: its names, dtypes, division into files and side files.
Without one it looks like the release: a single file of weights, and an index that points to it.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.released import TorchDistSource
from megabagel.checkpoint.safetensors_file import SafetensorsFile, Spec
from megabagel.checkpoint.sources import SafetensorsFolder
from megabagel.checkpoint.torch_dist import checkpoint_folder
from megabagel.config.folder import LATENT_TABLE, VIT_TABLE, is_checkpoint
from megabagel.config.load import saved_config
from megabagel.config.paths import autoencoder_path, tokenizer_path
from megabagel.config.schema import Config, ModelConfig
from megabagel.config.write_folder import write_model_config
from megabagel.models.position_tables import sincos_table

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
_JOURNAL = "unfinished.json"  # in the folder as long as it is not whole
_TABLES = {LATENT_TABLE, VIT_TABLE}


def read_config(checkpoint: Path) -> Config:
    """The configuration of the run that wrote `checkpoint` (a checkpoint folder)."""
    return saved_config(dist_checkpointing.load_common_state_dict(str(checkpoint))["run"]["config_yaml"])


@dataclass(frozen=True)
class Plan:
    """What is written where: file name -> tensor name -> spec."""

    checkpoint: Path
    model: ModelConfig
    weights: str  # ema or model
    base: Path | None
    out: Path
    files: dict[str, dict[str, Spec]]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for specs in self.files.values() for spec in specs.values())


def plan_export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    weights: str = "ema",
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int | None = None,
) -> Plan:
    """Which tensors go into which files. `dtype`: of all tensors; None: as in `base`, else as the run computed.

    Raises CheckpointError where the checkpoint cannot be read, or `base` is the folder of another model.
    """
    source_folder = checkpoint_folder(checkpoint)
    config = read_config(source_folder)
    model = config.model
    if model.has_sparse_experts:
        raise CheckpointError(
            f"checkpoint {source_folder} has sparse experts, which a BAGEL folder has no names for; train on from it "
            "with checkpoint.init_from"
        )
    source = TorchDistSource(source_folder, model, weights)
    released = None
    if base is None:
        base = _bagel_folder(config)
    if base is not None:
        released = SafetensorsFolder(base, (weights, "ema", "model"))
    own = torch.float32 if config.training.params_dtype == "fp32" else torch.bfloat16
    specs: dict[str, Spec] = {}
    for name in released.names() if released else sorted([*source.names(), *_tables(model)]):
        shape = _shape(name, source, released, model)
        specs[name] = Spec(shape, dtype or (released.dtype(name) if released else own))
    missing = sorted(source.names() - set(specs))
    if missing:
        raise CheckpointError(
            f"{base} does not have the tensor {missing[0]} ({len(missing)} in all), which the checkpoint has; it is "
            "the folder of another model: leave --base out or name the folder that the run began with"
        )
    files = _divide(specs, weights, released, max_file_bytes)
    if released:
        released.close()
    return Plan(source_folder, model, weights, Path(base) if base else None, Path(out), files)


def _bagel_folder(config: Config) -> str | None:
    """The folder that the run's weights came from, if it was a BAGEL folder and is still there."""
    found = config.checkpoint.init_from
    return found if found and Path(found).is_dir() and not is_checkpoint(Path(found)) else None


def _tables(model: ModelConfig) -> dict[str, int]:
    """Fixed position tables that the released weights carry: name -> side."""
    sides = {LATENT_TABLE: model.max_latent_size} if model.visual_gen else {}
    return sides | ({VIT_TABLE: model.vit.max_num_patch_per_side} if model.visual_und else {})


def _shape(name: str, source: TorchDistSource, released: SafetensorsFolder | None, model: ModelConfig):
    if source.holds(name):
        shape = source.shape(name)
        if released and released.shape(name) != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(shape)} in the checkpoint and {list(released.shape(name))} in "
                f"{released.folder}; name the folder that the run began with"
            )
        return shape
    return released.shape(name) if released else (_tables(model)[name] ** 2, model.hidden_size)


def _divide(specs, weights: str, released: SafetensorsFolder | None, max_file_bytes: int | None):
    """Tensors over files: as in `released`, or by size, or all in one."""
    if max_file_bytes is None:
        if released is None or not released.is_divided:
            return {f"{weights}.safetensors": dict(sorted(specs.items()))}
        files: dict[str, dict[str, Spec]] = {}
        for name in sorted(specs):
            files.setdefault(released.file_of(name), {})[name] = specs[name]
        return files
    parts: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in sorted(specs.items()):
        if parts[-1] and filled + spec.num_bytes > max_file_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = spec
        filled += spec.num_bytes
    return {f"{weights}-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def export(plan: Plan, processes: int = 1, done: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Write the folder of `plan`; `done` is told of bytes as they are written.

    A second call after an interruption goes on where the first one stopped. Until the end the folder holds a file that
    marks it as unfinished. Raises CheckpointError when the folder holds something else or the disk is too small.
    """
    out, journal = plan.out, plan.out / _JOURNAL
    files = {name: SafetensorsFile(out / name, specs) for name, specs in plan.files.items()}
    finished = _begin(plan, files, journal)
    work = [group for group in _groups(plan) if group[0] not in finished]
    done(sum(spec.num_bytes for name, spec in _specs(plan) if name in finished))
    for group in _write_all(plan, work, processes):
        finished.update(group)
        done(sum(spec.num_bytes for name, spec in _specs(plan) if name in group))
        with journal.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(name) + "\n" for name in group))
    _side_files(plan)
    for name in files:
        descriptor = os.open(out / name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    journal.unlink()


def _specs(plan: Plan) -> Iterator[tuple[str, Spec]]:
    for specs in plan.files.values():
        yield from specs.items()


def _groups(plan: Plan) -> list[tuple[str, ...]]:
    """Tensors that are written together, those of one parameter, largest first; the others one by one."""
    source = TorchDistSource(plan.checkpoint, plan.model, plan.weights)
    sizes = {name: spec.num_bytes for name, spec in _specs(plan)}
    groups = [tuple(names) for names in source.stored if set(names) <= set(sizes)]
    groups += [(name,) for name in sizes if not source.holds(name)]
    return sorted(groups, key=lambda names: -sum(sizes[name] for name in names))


def _begin(plan: Plan, files: dict[str, SafetensorsFile], journal: Path) -> set[str]:
    """Make the files, or find out which tensors an interrupted call has written."""
    description = json.dumps([str(plan.checkpoint), plan.weights, str(plan.files)])
    if journal.is_file():
        head, *written = journal.read_text(encoding="utf-8").splitlines()
        if head != description:
            raise CheckpointError(f"{plan.out} holds the beginning of another export; delete it or take another folder")
        return {json.loads(line) for line in written if line.endswith('"')}
    if plan.out.exists() and any(plan.out.iterdir()):
        raise CheckpointError(f"{plan.out} is not empty; take another --out or delete it")
    plan.out.mkdir(parents=True, exist_ok=True)
    needed, free = sum(file.num_bytes for file in files.values()), shutil.disk_usage(plan.out).free
    if needed > free:
        raise CheckpointError(f"{plan.out} has room for {free / 1e9:.1f} GB, but {needed / 1e9:.1f} GB are needed")
    for file in files.values():
        file.begin()
    journal.write_text(description + "\n", encoding="utf-8")
    return set()


def _write_all(plan: Plan, work: list[tuple[str, ...]], processes: int) -> Iterator[Iterable[str]]:
    """The groups as they are finished."""
    if processes == 1 or len(work) < 2:
        writer = _Writer(plan)
        for group in work:
            writer.write(group)
            yield group
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _start, (plan,)) as pool:
        for future in as_completed([pool.submit(_work, group) for group in work]):
            yield future.result()


class _Writer:
    """One process's open checkpoint, base folder and files."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.source = TorchDistSource(plan.checkpoint, plan.model, plan.weights)
        self.base = SafetensorsFolder(plan.base, (plan.weights, "ema", "model")) if plan.base else None
        self.file_of = {
            name: file
            for file_name, specs in plan.files.items()
            for file in [SafetensorsFile(plan.out / file_name, specs)]
            for name in specs
        }

    def write(self, group: tuple[str, ...]) -> None:
        for name, tensor in self._read(group).items():
            self.file_of[name].write(name, tensor)

    def _read(self, group: tuple[str, ...]) -> dict[str, Tensor]:
        if group in self.source.stored:
            return self.source.export(self.source.stored[group])
        (name,) = group
        if self.base:  # what training leaves alone: position tables, layers that are not used
            return {name: self.base.read(name, self.base.shape(name), None, 0, 0)}
        return {name: sincos_table(_tables(self.plan.model)[name], self.plan.model.hidden_size)}


_writer: _Writer  # of this worker process


def _start(plan: Plan) -> None:
    global _writer
    torch.set_num_threads(1)
    _writer = _Writer(plan)


def _work(group: tuple[str, ...]) -> tuple[str, ...]:
    _writer.write(group)
    return group


def _side_files(plan: Plan) -> None:
    """Everything beside the weights: from the base folder, else from the run's configuration."""
    total = plan.num_bytes
    weight_map = {name: file for file, specs in plan.files.items() for name in specs}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    (plan.out / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
    if len(plan.files) > 1 and plan.weights != "model":
        (plan.out / f"{plan.weights}.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
    if plan.base:
        for path in sorted(plan.base.iterdir()):
            is_weights = path.name.startswith(("ema", "model")) and ".safetensors" in path.name
            if path.is_file() and not is_weights:
                shutil.copy(path, plan.out / path.name)
        return
    config = read_config(plan.checkpoint)
    write_model_config(plan.out, plan.model, "float32" if config.training.params_dtype == "fp32" else "bfloat16")
    if config.model.visual_gen and (found := autoencoder_path(config)):
        path = Path(found)
        _copy(path / "ae.safetensors" if path.is_dir() else path, plan.out / "ae.safetensors")
    for name in TOKENIZER_FILES:
        if tokenizer := tokenizer_path(config):
            _copy(Path(tokenizer) / name, plan.out / name)


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        shutil.copy(source, target)
    elif target.name in ("ae.safetensors", "tokenizer.json"):
        logger.warning("%s is not there any more: copy %s into the folder yourself", source, target.name)
