"""Writes a start checkpoint with sparse experts out of a dense model's weights, parameter by parameter.

`upcycling.py` says what experts start as; here it is read from a BAGEL folder or a checkpoint and written as a
checkpoint of step 0, the moving average beside the weights where there is one.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megabagel.checkpoint import folder
from megabagel.checkpoint.bagel_folder import side_files
from megabagel.checkpoint.ema import PREFIX as EMA
from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.file_record import record_of
from megabagel.checkpoint.folder import sync
from megabagel.checkpoint.given_weights import GivenWeights, open_weights
from megabagel.checkpoint.names import fill_shard
from megabagel.checkpoint.own_keys import own_shapes
from megabagel.checkpoint.pieces import Piece, Place
from megabagel.checkpoint.released import Stored, TorchDistSource, stored_parameters
from megabagel.checkpoint.sources import Scratch
from megabagel.checkpoint.torch_dist_writer import PieceWriter, finish
from megabagel.checkpoint.upcycling import Upcycled, dense_twin
from megabagel.config.checks_experts import expert_faults
from megabagel.config.errors import ConfigError
from megabagel.config.folder import CARRIED, side_folder
from megabagel.config.load import to_yaml
from megabagel.config.schema import Config

FILE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Entry:
    """One parameter that is written. `dense`: released names of what it is read from, and of new ones beside."""

    stored: Stored
    dtype: torch.dtype
    dense: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(map(prod, self.stored.rule.shapes)) * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """`sets`: prefix of the keys (none for weights, `ema.PREFIX`) -> where their tensors are, and what is written."""

    config: Config
    out: Path
    shapes: dict[str, tuple[int, ...]]
    sets: dict[str, tuple[GivenWeights, list[Entry]]]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for _, entries in self.sets.values() for entry in entries)


def plan_upcycling(
    given: str | Path,
    out: str | Path,
    *,
    und_num_experts: int | None = None,
    gen_num_experts: int | None = None,
    shared_expert_size: int | None = None,
    weights: str | None = None,
) -> Plan:
    """What the checkpoint in the run folder `out` is made of. `given`: see `open_weights`.

    `weights`: ema or model, the one set to take as the weights; None: both where both are there.

    Raises CheckpointError or ConfigError when the weights are not dense or cannot have such experts.
    """
    opened = _sets(Path(given), weights)
    first = opened[""]
    changes = {"und_num_experts": und_num_experts, "gen_num_experts": gen_num_experts}
    config = _config(first, changes, shared_expert_size)
    shapes = own_shapes(config.model)
    parameters = stored_parameters(shapes, config.model)
    sets = {prefix: (of, _entries(of, parameters, prefix)) for prefix, of in opened.items()}
    return Plan(config, Path(out), shapes, sets)


def upcycle(plan: Plan, done: Callable[[int], None] = lambda num_bytes: None) -> Path:
    """Write the checkpoint and return its folder; `done` is told of bytes as they are written.

    Until the end there is nothing that looks like a checkpoint. Raises CheckpointError when `out` holds something or
    the disk is too small.
    """
    if plan.out.exists() and any(path for path in plan.out.iterdir() if path.suffix != ".partial"):
        raise CheckpointError(f"{plan.out} is not empty; take another --out or delete it")
    partial = folder.begin(plan.out, 0, plan.num_bytes)
    writer, written = PieceWriter(partial, 0), []
    for batch in _batches(plan):
        written.append(writer.write(_pieces(plan, batch)))
        done(sum(entry.num_bytes for _, entry in batch))
    files = finish(partial, written, {"run": _run(plan)}) | _carry(plan, partial)
    return folder.finish(plan.out, 0, files)


def _carry(plan: Plan, partial: Path) -> dict[str, folder.FileRecord]:
    """Tokenizer, autoencoder and configurations of the BAGEL folder behind the weights; their records."""
    given = plan.sets[""][0]
    beside = Path(side_folder(str(given.source.folder)))
    if given.config and beside == given.source.folder:  # a run's own: its configuration says where these are
        beside = Path(side_folder(given.config.checkpoint.init_from or "."))
    if not (beside / "llm_config.json").is_file():
        return {}
    (partial / CARRIED).mkdir()
    records = {}
    for path in side_files(beside):
        name = f"{CARRIED}/{path.name}"
        shutil.copy(path, partial / name)
        sync(partial / name)
        records[name] = record_of(partial / name)
    return records


def _sets(given: Path, weights: str | None) -> dict[str, GivenWeights]:
    if weights is not None:
        return {"": open_weights(given, weights)}
    live = open_weights(given, "model")
    if isinstance(live.source, TorchDistSource):
        average = open_weights(given, "ema")
        has_average = any(stored.key.startswith(EMA) for stored in average.source.stored.values())
    else:
        average = live
        has_average = all((given / f"{stem}.safetensors").is_file() for stem in ("ema", "model"))
        if has_average:
            average = open_weights(given, "ema")
    return {"": live, EMA: average} if has_average else {"": live}


def _config(given: GivenWeights, experts: dict[str, int | None], shared: int | None) -> Config:
    """The configuration that the checkpoint carries: that of the run behind the weights, with experts."""
    config, model = given.config or Config(), given.model
    wanted = {name: number for name, number in experts.items() if number is not None}
    if not wanted:
        raise CheckpointError("no stream gets experts; give --und-num-experts, --gen-num-experts or both")
    if given.model.has_sparse_experts:
        raise CheckpointError(
            f"{given.source.folder} has sparse experts already; train from it with checkpoint.init_from, or make "
            "others from the dense weights that it came from"
        )
    model = replace(model, **wanted, moe_shared_expert_intermediate_size=shared, moe_ffn_hidden_size=None, folder=None)
    if given.config is None:
        is_single = given.source.dtype(min(given.source.names())) == torch.float32
        config = replace(config, training=replace(config.training, params_dtype="fp32" if is_single else "bf16"))
    config = replace(config, model=model)
    for fault in expert_faults(replace(config, parallel=Config().parallel)):
        raise ConfigError(fault)
    return config


def _entries(given: GivenWeights, parameters: list[Stored], prefix: str) -> list[Entry]:
    """What of `parameters` the set of weights has: an average may leave out what is frozen."""
    entries = []
    for stored in parameters:
        dense = tuple(dense_twin(name) or name for name in stored.rule.names)
        if not all(given.source.holds(name) for name in dense):
            missing = next(name for name in dense if not given.source.holds(name))
            raise CheckpointError(f"{given.source.folder} has no tensor {missing}, which the model needs")
        averaged = isinstance(given.source, TorchDistSource) and prefix == EMA
        if averaged and not given.source.stored_as(dense[0]).key.startswith(EMA):
            continue
        entries.append(Entry(stored, given.source.dtype(dense[0]), dense))
    return entries


def _batches(plan: Plan) -> Iterator[list[tuple[str, Entry]]]:
    """What goes into one file each: (prefix, entry)."""
    batch, filled = [], 0
    for prefix, (_, entries) in plan.sets.items():
        for entry in entries:
            batch.append((prefix, entry))
            filled += entry.num_bytes
            if filled >= FILE_BYTES:
                yield batch
                batch, filled = [], 0
    if batch:
        yield batch


def _pieces(plan: Plan, batch: list[tuple[str, Entry]]) -> Iterator[Piece]:
    scratch = Scratch(plan.config.training.seed, plan.config.model.init_std)
    last, value = None, torch.empty(0)
    for prefix, entry in batch:
        stored = entry.stored
        same = (prefix, stored.key, stored.index[:1], entry.dense)
        if same != last:  # the experts of a layer are equal
            source = Upcycled(plan.sets[prefix][0].source, scratch)
            last, value = same, torch.empty(plan.shapes[stored.key][len(stored.index) :], dtype=entry.dtype)
            fill_shard(value, source, stored.rule, 0, 1)
        yield from _place(prefix, plan.shapes[stored.key], stored, value).whole(value)


def _place(prefix: str, whole: tuple[int, ...], stored: Stored, value: Tensor) -> Place:
    offsets = (*stored.index, *[0] * value.dim())
    return Place(prefix + stored.key, whole, offsets, (*[1] * len(stored.index), *value.shape))


def _run(plan: Plan) -> dict[str, object]:
    """What a checkpoint says about the run: no step was done, and there is no state but weights."""
    return {
        "step": 0,
        "counters": {},
        "optimizer_steps": 0,
        "data_state": None,
        "config_yaml": to_yaml(plan.config),
        "layout": (1, 1, 1, 1, 1),
        "has_ema": EMA in plan.sets,
    }
