"""Saves and loads the whole state of a run, from and into any parallel layout.

A checkpoint is in megatron-core's torch_dist format; every rank writes and reads its own pieces of it. Which folders
there are and which is the newest is `folder`'s business; weights for other programs are `hf`'s.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megabagel.checkpoint import ema as ema_state
from megabagel.checkpoint import folder, generators, integrity
from megabagel.checkpoint import optimizer as optimizer_state
from megabagel.checkpoint.errors import CheckpointError, UnreadableError
from megabagel.checkpoint.held import Held
from megabagel.checkpoint.local import LocalCheckpoint, LocalJob, LocalStore, common_steps
from megabagel.checkpoint.misfit import misfits
from megabagel.checkpoint.saver import Job, Saver
from megabagel.checkpoint.torch_dist import TorchDist
from megabagel.checkpoint.torch_dist_writer import COMMON
from megabagel.checkpoint.upcycling import density_fault
from megabagel.runtime.overlap import publish_main_parameters, whole_parameters

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds besides model, optimizer, average and random generators, which are put in place."""

    step: int  # updates done
    counters: dict[str, float]
    data_state: object  # of all replicas
    config_yaml: str
    folder: Path
    watched: dict[str, object]  # what the run knows of its losses so far


def save(
    run_dir: str | Path,
    step: int,
    model_chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    ema: ema_state.Average | None,
    *,
    data_state: object,
    counters: dict[str, float],
    config_yaml: str,
    watched: Mapping[str, object] | None = None,
    metrics: Mapping[str, float] | None = None,
    saver: Saver | None = None,
) -> Path:
    """Write the state after `step` updates; all ranks call it. Returns the folder that the checkpoint gets.

    It is on disk and the newest when they return, unless `saver` works in the background. `data_state` and `watched`
    are equal on all ranks. `metrics`: what is known of the model's quality, by name. Raises CheckpointError on all
    ranks when the checkpoint cannot be written.
    """
    held = Held(model_chunks, optimizer, ema)
    run = _run(step, optimizer, ema, data_state, counters, config_yaml, watched)
    objects = {_generators_key(): generators.state(), **held.objects_to_write()}
    common = {"run": run} if dist.get_rank() == 0 else {}
    (saver or Saver(background=False)).save(Job(run_dir, step, held.to_write(), objects, common, metrics))
    return folder.step_folder(run_dir, step)


def save_locally(
    store: LocalStore,
    step: int,
    model_chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    ema: ema_state.Average | None,
    *,
    data_state: object,
    counters: dict[str, int],
    config_yaml: str,
    saver: Saver,
    watched: Mapping[str, object] | None = None,
) -> None:
    """As `save`, but each rank writes what it holds itself to a disk of its own, and asks nobody."""
    held = Held(model_chunks, optimizer, ema)
    run = _run(step, optimizer, ema, data_state, counters, config_yaml, watched)
    objects = {_generators_key(): generators.state(), **held.objects_to_keep()}
    saver.save(LocalJob(store, step, held.to_keep(), objects, run))


def _run(
    step: int,
    optimizer: MegatronOptimizer,
    ema: ema_state.Average | None,
    data_state: object,
    counters: dict[str, int],
    config_yaml: str,
    watched: Mapping[str, object] | None,
) -> dict:
    return {
        "step": step,
        "counters": counters,
        "optimizer_steps": optimizer_state.steps_done(optimizer),
        "data_state": data_state,
        "config_yaml": config_yaml,
        "watched": dict(watched or {}),
        "layout": _layout(),
        "has_ema": ema is not None,
    }


def exists(run_dir: str | Path, local: LocalStore | None = None) -> bool:
    """Whether `load` has a checkpoint to try; all ranks call it."""
    return bool(_from_rank_0(lambda: folder.steps_to_try(run_dir)) or (local and common_steps(local, run_dir)[0]))


def load(
    run_dir: str | Path,
    model_chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    ema: ema_state.Average | None,
    *,
    verify: bool = True,
    local: LocalStore | None = None,
    before: int | None = None,
) -> RunState | None:
    """Continue from the newest whole checkpoint of `run_dir`, of steps below `before`; None on all ranks without any.

    One in `local` comes first when it is newer and all ranks have it.

    A damaged checkpoint is passed over with an error in the log, and the one before it is taken; `verify`: the content
    of all files is compared with their checksums first. Raises CheckpointError on all ranks when the newest whole one
    does not fit the model, naming the tensors, or when every one is damaged.
    """
    steps = _from_rank_0(lambda: folder.steps_to_try(run_dir))
    local_steps, note = common_steps(local, run_dir) if local else ([], None)
    if note:
        _say("%s", note)
    if before is not None:
        steps, local_steps = ([step for step in found if step < before] for found in (steps, local_steps))
    for step in local_steps:
        fault, state = _attempt(lambda step=step: _open_local(local, step), model_chunks, optimizer, ema)
        if fault is None:
            return state
        _say("the local checkpoints after step %d cannot be used: one %s", step, fault)
    for step in steps:
        source = folder.step_folder(run_dir, step)
        fault = integrity.damage(source, checksums=verify)
        if fault is None:
            fault, state = _attempt(lambda source=source: _open_shared(source), model_chunks, optimizer, ema)
            if fault is None:
                return state
        if dist.get_rank() == 0:
            logger.error("Checkpoint %s %s; trying the one before it.", source, fault)
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {run_dir} can be read (the newest is {steps[0]}); restore one, "
            "or start in another checkpoint.run_dir"
        )
    return None


def _open_shared(source: Path) -> tuple[TorchDist, dict]:
    return TorchDist(source), _run_of(source)


def _open_local(store: LocalStore, step: int) -> tuple[LocalCheckpoint, dict]:
    checkpoint = store.read(step)
    return checkpoint, checkpoint.run


def _attempt(
    open_checkpoint: Callable[[], tuple[TorchDist | LocalCheckpoint, dict]],
    model_chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    ema: ema_state.Average | None,
) -> tuple[str | None, RunState | None]:
    """Load one checkpoint: (None, its state), or what is wrong with it on some rank. All ranks return alike."""
    fault, opened = _agree(open_checkpoint)
    if fault is not None:
        return fault, None
    tensors, run = opened
    source = tensors.source
    if "data_state" not in run:
        raise CheckpointError(
            f"checkpoint {source} was written before replicas shared one order of the data, so its place in the data "
            "is unknown; start a new run from its weights: --checkpoint.init_from with another checkpoint.run_dir"
        )
    loads_ema = ema is not None and run["has_ema"]
    held = Held(model_chunks, optimizer, ema if loads_ema else None)
    if isinstance(tensors, TorchDist):  # a rank's own pieces are compared when they are read
        _check(held.shapes(), tensors)
    fault, saved_generators = _agree(lambda: _read(held, tensors, run))
    if fault is not None:
        return fault, None
    optimizer_state.set_steps_done(optimizer, run["optimizer_steps"])
    with whole_parameters(model_chunks):
        publish_main_parameters(optimizer)
    if ema is not None and not loads_ema:
        ema.reset()
        _say("the checkpoint %s has no moving average: it starts again from the loaded weights", source)
    if saved_generators is not None:
        generators.restore(saved_generators)
    else:
        _say("the parallel layout has changed since %s: random generators start again from the seed", source)
    return None, RunState(
        run["step"], run["counters"], run["data_state"], run["config_yaml"], source, run.get("watched", {})
    )


def _run_of(source: Path) -> dict:
    try:
        return torch.load(source / COMMON, map_location="cpu", weights_only=False)["run"]
    except Exception as error:  # a damaged file may raise anything
        raise UnreadableError(f"{COMMON} cannot be read ({_first_line(error)})") from None


def _read(held: Held, tensors: TorchDist | LocalCheckpoint, run: dict) -> dict | None:
    """Fill this rank's state; returns that of the random generators, None when it belongs to another layout."""
    with torch.no_grad():
        held.read(tensors)
    return tensors.read_object(_generators_key()) if tuple(run["layout"]) == _layout() else None


def _agree(action: Callable[[], _T]) -> tuple[str | None, _T | None]:
    """Do something that may find a file damaged: (None, its result), or on all ranks what the first such rank found."""
    fault = result = None
    try:
        result = action()
    except UnreadableError as error:
        logger.debug("Reading failed.", exc_info=True)
        fault = f"cannot be read ({error})"
    faults = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next((f for f in faults if f is not None), None), result


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].split('. ')[0]}"


def _check(mine: dict[str, tuple[int, ...]], tensors: TorchDist) -> None:
    """Raise CheckpointError on all ranks when a wanted tensor is missing or has another shape, or one is left over."""
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    expected = {key: shape for rank in of_ranks for key, shape in rank.items()}
    found = tensors.shapes
    if not any(key.startswith(ema_state.PREFIX) for key in expected):
        found = {key: shape for key, shape in found.items() if not key.startswith(ema_state.PREFIX)}
    if faults := misfits(expected, found):
        if kinds := density_fault(found, expected):
            raise CheckpointError(f"checkpoint {tensors.source} does not fit this model: {kinds}")
        raise CheckpointError(
            f"checkpoint {tensors.source} does not fit this model: {faults}; use the model and "
            "freezing settings that it was saved with, or start in another checkpoint.run_dir"
        )


def _layout() -> tuple[int, ...]:
    """(tensor, context, expert, pipeline, data) parallel sizes: generators can be continued only rank by rank."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
    )


def _generators_key() -> str:
    return f"rng/shard_{dist.get_rank()}_{dist.get_world_size()}"


def _from_rank_0(look: Callable[[], _T]) -> _T:
    """The result of `look` on rank 0, or its exception, on all ranks: file systems may show ranks different things."""
    outcome = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [look()]
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _say(message: str, *values: object) -> None:
    if dist.get_rank() == 0:
        logger.warning(message, *values)
