"""Writes a BAGEL folder from a checkpoint of ours, tensor by tensor: memory is that of a few tensors, not of the model.

What goes where is `export_plan.py`'s matter.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.export_plan import Plan, tables
from megabagel.checkpoint.export_side_files import write_side_files
from megabagel.checkpoint.folder import sync
from megabagel.checkpoint.journal import Journal
from megabagel.checkpoint.names import EMBEDDING, LM_HEAD
from megabagel.checkpoint.released import TorchDistSource
from megabagel.checkpoint.side_by_side import side_by_side
from megabagel.models.position_tables import sincos_table

_JOURNAL = "unfinished.json"  # in the folder as long as it is not whole


@dataclass(frozen=True)
class Group:
    """Tensors that are written together: those of one parameter, or a single one that is none."""

    weights: str
    names: tuple[str, ...]
    num_bytes: int

    @property
    def label(self) -> str:
        return f"{self.weights} {self.names[0]}"


def export(plan: Plan, processes: int = 1, done: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Write the folder of `plan`; `done` is told of bytes as they are written.

    A second call after an interruption goes on where the first one stopped. Until the end the folder holds a file that
    marks it as unfinished. Raises CheckpointError when the folder holds something else or the disk is too small.
    """
    heads = {name: zlib.crc32(head) for name, head in plan.files.items()}
    journal = Journal(plan.out / _JOURNAL, json.dumps([str(plan.checkpoint), plan.weights, heads]))
    finished = journal.resume()
    if finished is None:
        _begin(plan)
        journal.begin()
    groups = _groups(plan)
    left = [group for group in groups if group.label not in (finished or {})]
    done(sum(group.num_bytes for group in groups) - sum(group.num_bytes for group in left))
    for group, _ in side_by_side(partial(_Writer, plan), left, processes):
        journal.add(group.label)
        done(group.num_bytes)
    write_side_files(plan)
    for path in plan.out.iterdir():
        sync(path)
    journal.end()
    sync(plan.out)


def _groups(plan: Plan) -> list[Group]:
    """Largest first, so that processes end together."""
    groups = []
    for weights in plan.weights:
        source = TorchDistSource(plan.checkpoint, plan.model, weights)
        sizes = {
            name: spec.num_bytes
            for file_name, file in plan.open().items()
            if plan.weights_of[file_name] == weights
            for name, spec in file.specs.items()
        }
        together = [names for names in source.stored if set(names) <= set(sizes)]
        together += [(name,) for name in sizes if not source.holds(name)]
        groups += [Group(weights, names, sum(sizes[name] for name in names)) for names in together]
    return sorted(groups, key=lambda group: -group.num_bytes)


def _begin(plan: Plan) -> None:
    """Make the files."""
    if plan.out.exists() and any(path.name != _JOURNAL for path in plan.out.iterdir()):
        raise CheckpointError(f"{plan.out} is not empty; take another --out or delete it")
    plan.out.mkdir(parents=True, exist_ok=True)
    needed, free = sum(file.num_bytes for file in plan.open().values()), shutil.disk_usage(plan.out).free
    if needed > free:
        raise CheckpointError(f"{plan.out} has room for {free / 1e9:.1f} GB, but {needed / 1e9:.1f} GB are needed")
    for file in plan.open().values():
        file.begin()


class _Writer:
    """One process's open checkpoint, base folder and files."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.sources = {weights: TorchDistSource(plan.checkpoint, plan.model, weights) for weights in plan.weights}
        self.bases = {weights: plan.base_folder(weights) for weights in plan.weights}
        self.file_of = {
            (plan.weights_of[name], tensor): file for name, file in plan.open().items() for tensor in file.specs
        }

    def __call__(self, group: Group) -> None:
        for name, tensor in self._read(group).items():
            self.file_of[group.weights, name].write(name, tensor)

    def _read(self, group: Group) -> dict[str, Tensor]:
        source, base, model = self.sources[group.weights], self.bases[group.weights], self.plan.model
        if group.names in source.stored:
            return source.export(source.stored[group.names])
        (name,) = group.names
        if name == LM_HEAD and model.tie_word_embeddings:
            return {name: source.export(source.stored[(EMBEDDING,)])[EMBEDDING]}
        if base:  # what training leaves alone: position tables, layers that are not used
            return {name: base.read_whole(name)}
        return {name: sincos_table(tables(model)[name], model.hidden_size)}
