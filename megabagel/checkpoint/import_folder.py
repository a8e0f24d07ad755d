"""Makes a checkpoint of ours from released weights, rows by rows: memory is that of one piece, not of the model.

The weights are a BAGEL folder's, an official training checkpoint's, or of a Qwen2.5 and a SigLIP folder. `export.py` is
the way back; what it needs for it, files beside the weights and their headers, is carried along.
"""

import base64
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from megabagel.checkpoint import folder
from megabagel.checkpoint.bagel_folder import BagelFolder, carry, side_files, stems_in
from megabagel.checkpoint.ema import PREFIX as EMA
from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.file_record import record_of
from megabagel.checkpoint.folder import sync
from megabagel.checkpoint.journal import Journal
from megabagel.checkpoint.names import Rule, Source
from megabagel.checkpoint.own_keys import own_shapes
from megabagel.checkpoint.pieces import LIMIT, Piece
from megabagel.checkpoint.released import Stored, stored_parameters
from megabagel.checkpoint.side_by_side import side_by_side
from megabagel.checkpoint.start_folders import StartFolders
from megabagel.checkpoint.torch_dist_writer import PieceWriter, Written, finish
from megabagel.config.folder import CARRIED, read_model_config
from megabagel.config.load import to_yaml
from megabagel.config.schema import Config, ModelConfig, TrainingConfig

STEP = 0
UNIT = 256 * 2**20  # bytes that one process writes to one file; what an interruption loses
_JOURNAL = "unfinished.json"
_TWIN, _MLP_TWIN = "self_attn.q_proj_moe_gen.weight", "mlp_moe_gen.gate_proj.weight"


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of one parameter (of one layer of a stacked one)."""

    parameter: Stored
    start: int
    stop: int


@dataclass(frozen=True)
class ImportPlan:
    """What is read and where it goes. `sets`: prefix of the keys -> stem of the weights' files."""

    out: Path
    model: ModelConfig
    weights: Path | StartFolders
    sets: dict[str, str]
    side: tuple[Path, ...]  # folders with files to carry along; the first one wins
    shapes: dict[str, tuple[int, ...]]  # of all keys
    dtypes: dict[str, torch.dtype]
    units: list[list[Rows]] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        return sum(self.unit_bytes(unit) for unit in self.units)

    def unit_bytes(self, unit: list[Rows]) -> int:
        return sum(
            (rows.stop - rows.start) * _row_bytes(rows.parameter.rule, self.dtypes[rows.parameter.key]) for rows in unit
        )

    def source(self, prefix: str) -> Source:
        """The weights behind the keys of `prefix`."""
        if isinstance(self.weights, StartFolders):
            return self.weights.source(self.model)
        return BagelFolder(self.weights, (self.sets[prefix],))


def plan_import(
    weights: str | Path | StartFolders,
    out: str | Path,
    *,
    base: str | Path | None = None,
    only: str | None = None,
    dtype: torch.dtype | None = None,
    unit_bytes: int = UNIT,
) -> ImportPlan:
    """What a checkpoint in the run folder `out` is made of.

    `base`: BAGEL folder with the configurations and tokenizer that the folder `weights` lacks. `only`: ema or model,
    the one set of weights to take; None: both where both are there, one as the moving average. `dtype`: of all tensors;
    None: as they are, bfloat16 for a start checkpoint.

    Raises CheckpointError or ConfigError where something needed is missing or does not fit.
    """
    if isinstance(weights, StartFolders):
        model, sets, side = weights.model(), {"": ""}, ()
        dtype = dtype or torch.bfloat16
    else:
        weights = Path(weights)
        sets = _sets(weights, only)
        side = (weights, Path(base)) if base else (weights,)
        model = _model(weights, Path(base) if base else weights, sets[""])
    own = own_shapes(model)
    shapes = {prefix + key: shape for prefix in sets for key, shape in own.items()}
    plan = ImportPlan(Path(out), model, weights, sets, side, shapes, {}, [])
    parameters = [p for prefix in sets for p in stored_parameters(own, model) for p in [_prefixed(p, prefix)]]
    for prefix in sets:
        source = plan.source(prefix)
        for parameter in parameters:
            if parameter.key.startswith(EMA) == (prefix == EMA):
                found = dtype if isinstance(weights, StartFolders) else _dtype(source, parameter.rule, dtype)
                known = plan.dtypes.get(parameter.key, found)
                plan.dtypes[parameter.key] = torch.promote_types(known, found)
    plan.units.extend(_units(plan, parameters, unit_bytes))
    return plan


def _prefixed(parameter: Stored, prefix: str) -> Stored:
    return Stored(prefix + parameter.key, parameter.index, parameter.rule)


def _sets(weights: Path, only: str | None) -> dict[str, str]:
    """Live weights under their own keys and the average beside them; a single set is the weights."""
    if not weights.is_dir():
        raise CheckpointError(f"there is no folder {weights} to read weights from")
    found = stems_in(weights)
    if only is not None:
        if only not in found:
            raise CheckpointError(f"{weights} has no {only}.safetensors; take the weights that it has")
        return {"": only}
    if not found:
        raise CheckpointError(f"{weights} holds neither ema.safetensors nor model.safetensors nor an index JSON")
    return {"": "model", EMA: "ema"} if len(found) == 2 else {"": found[0]}


def _model(weights: Path, configs: Path, stem: str) -> ModelConfig:
    """Shape of the model; the kind of its layers, where no file says it, by the names of its tensors."""
    names = " ".join(BagelFolder(weights, (stem,)).names())
    variant = "mot" if _TWIN in names else "moe" if _MLP_TWIN in names else "dense"
    found = weights if (weights / "llm_config.json").is_file() else configs
    return read_model_config(str(found), ModelConfig(layer_variant=variant))


def _dtype(source: BagelFolder, rule: Rule, wanted: torch.dtype | None) -> torch.dtype:
    """Of a parameter in the checkpoint; also checks that its tensors are there in the shapes that the model has."""
    for name, shape in zip(rule.names, rule.shapes, strict=True):
        if (found := source.shape(name)) != shape:
            raise CheckpointError(
                f"tensor {name} in {source.folder} has shape {list(found)}, but by its configuration the model has "
                f"{list(shape)}; take the configuration that belongs to the weights (--base)"
            )
    return wanted or reduce(torch.promote_types, (source.spec(name).dtype for name in rule.names))


def _row_bytes(rule: Rule, dtype: torch.dtype) -> int:
    return torch.Size(rule.shapes[0][1:]).numel() * dtype.itemsize


def _units(plan: ImportPlan, parameters: list[Stored], limit: int) -> Iterator[list[Rows]]:
    """All rows in pieces that a reader may take as a whole, about `limit` bytes of them together."""
    unit, filled = [], 0
    for parameter in parameters:
        rule, dtype = parameter.rule, plan.dtypes[parameter.key]
        total = sum(shape[0] for shape in rule.shapes)
        step = LIMIT // (_row_bytes(rule, dtype) or 1)
        if rule.blocks > 1:  # whole blocks
            step -= step % (total // rule.blocks)
            step = max(step, total // rule.blocks)
        for start in range(0, total, max(step, 1)):
            rows = Rows(parameter, start, min(start + max(step, 1), total))
            unit.append(rows)
            filled += plan.unit_bytes([rows])
            if filled >= limit:
                yield unit
                unit, filled = [], 0
    if unit:
        yield unit


def import_folder(plan: ImportPlan, processes: int = 1, done: Callable[[int], None] = lambda num_bytes: None) -> Path:
    """Write the checkpoint of `plan` and return its folder; `done` is told of bytes as they are written.

    A second call after an interruption goes on where the first one stopped. Until the end there is nothing that looks
    like a checkpoint. Raises CheckpointError when `out` holds something else or the disk is too small.
    """
    partial_folder = folder.partial_folder(plan.out, STEP)
    journal = Journal(partial_folder / _JOURNAL, _heading(plan))
    finished = journal.resume()
    if finished is None:
        if plan.out.exists() and any(p for p in plan.out.iterdir() if p != partial_folder):
            raise CheckpointError(f"{plan.out} is not empty; take another --out or delete it")
        folder.begin(plan.out, STEP, plan.num_bytes + _side_bytes(plan))
        journal.begin()
        finished = {}
    left = [number for number in range(len(plan.units)) if str(number) not in finished]
    done(sum(plan.unit_bytes(plan.units[int(number)]) for number in finished))
    for number, result in side_by_side(partial(_Worker, plan), left, processes):
        finished[str(number)] = result
        journal.add(str(number), result)
        done(plan.unit_bytes(plan.units[number]))
    written = [pickle.loads(base64.b64decode(result)) for result in finished.values()]
    _carry(plan, partial_folder / CARRIED)
    files = finish(partial_folder, written, {"run": _run(plan)})
    for path in sorted((partial_folder / CARRIED).iterdir()):
        sync(path)
        files[f"{CARRIED}/{path.name}"] = record_of(path)
    journal.end()
    records = {name: folder.FileRecord(record.size, record.crc32) for name, record in files.items()}
    return folder.finish(plan.out, STEP, records)


def _heading(plan: ImportPlan) -> str:
    dtypes = {key: str(dtype) for key, dtype in plan.dtypes.items()}
    return json.dumps([str(plan.weights), plan.sets, str(plan.side), len(plan.units), dtypes, str(plan.shapes)])


class _Worker:
    """One process's sources and file."""

    def __init__(self, plan: ImportPlan):
        self.plan = plan
        self.sources = {prefix: plan.source(prefix) for prefix in plan.sets}

    def __call__(self, number: int) -> str:
        """Write a unit to the file that its number names, over what an interrupted call has left."""
        target = folder.partial_folder(self.plan.out, STEP)
        torch.serialization.set_crc32_options(False)  # the manifest has checksums of the same bytes
        try:
            written: Written = PieceWriter(target, number).write(self._piece(rows) for rows in self.plan.units[number])
        finally:
            torch.serialization.set_crc32_options(True)
        return base64.b64encode(pickle.dumps(written)).decode()

    def _piece(self, rows: Rows) -> Piece:
        stored = rows.parameter
        source = self.sources[EMA if stored.key.startswith(EMA) else ""]
        data = read_rows(source, stored.rule, rows.start, rows.stop)
        shape = self.plan.shapes[stored.key]
        offsets = (*stored.index, rows.start, *[0] * (data.dim() - 1))
        data = data[(None,) * len(stored.index)]
        return Piece(stored.key, shape, offsets, data, self.plan.dtypes[stored.key])


def read_rows(source: Source, rule: Rule, start: int, stop: int) -> Tensor:
    """Rows of a parameter that is not split over ranks; whole blocks where it has more than one (see `Rule`)."""
    total = sum(shape[0] for shape in rule.shapes)
    if rule.blocks > 1:
        first, last = (row * rule.blocks // total for row in (start, stop))
        parts = []
        for name, shape in zip(rule.names, rule.shapes, strict=True):
            width = shape[0] // rule.blocks
            parts.append(source.read(name, shape, 0, first * width, last * width).unflatten(0, (last - first, -1)))
        return torch.cat(parts, dim=1).flatten(0, 1)
    parts, before = [], 0
    for name, shape in zip(rule.names, rule.shapes, strict=True):
        low, high = max(start - before, 0), min(stop - before, shape[0])
        if low < high:
            parts.append(source.read(name, shape, 0, low, high))
        before += shape[0]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _side_bytes(plan: ImportPlan) -> int:
    return sum(path.stat().st_size for path in _side_files(plan).values())


def _side_files(plan: ImportPlan) -> dict[str, Path]:
    """Name in the carried folder -> file."""
    if isinstance(plan.weights, StartFolders):
        return plan.weights.side_files()
    return {path.name: path for of in reversed(plan.side) for path in side_files(of)}


def _carry(plan: ImportPlan, target: Path) -> None:
    target.mkdir(exist_ok=True)
    if isinstance(plan.weights, StartFolders):
        plan.weights.write_config(target, plan.model)
    else:
        taken = {name for unit in plan.units for rows in unit for name in rows.parameter.rule.names}
        carry([plan.source(prefix) for prefix in plan.sets], taken, target)
    for name, path in _side_files(plan).items():
        shutil.copy(path, target / name)


def _run(plan: ImportPlan) -> dict[str, object]:
    """What a run's checkpoint says about itself; this one's has done no step and has no state but weights."""
    precision = "fp32" if torch.float32 in plan.dtypes.values() else "bf16"
    config = Config(plan.model, training=TrainingConfig(params_dtype=precision))
    config.model.folder = None  # its shape is in the text
    return {
        "step": STEP,
        "counters": {},
        "optimizer_steps": 0,
        "data_state": None,
        "config_yaml": to_yaml(config),
        "layout": (1, 1, 1, 1, 1),
        "has_ema": EMA in plan.sets,
    }
