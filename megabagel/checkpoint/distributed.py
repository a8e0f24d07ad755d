"""Saves and loads the whole state of a run with megatron-core's torch_dist format, from and into any parallel layout.

Which folders there are and which is the newest is `folder`'s business; weights for other programs are `hf`'s.
"""

import contextlib
import logging
import queue
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megabagel.checkpoint import ema as ema_state
from megabagel.checkpoint import folder
from megabagel.checkpoint import optimizer as optimizer_state
from megabagel.checkpoint.errors import CheckpointError
from megabagel.runtime.overlap import publish_main_parameters, whole_parameters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds besides model, optimizer, average and random generators, which are put in place."""

    step: int  # updates done
    counters: dict[str, int]
    data_state: object  # of all replicas
    config_yaml: str
    folder: Path


def save(
    run_dir: str | Path,
    step: int,
    model_chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    ema: ema_state.Average | None,
    *,
    data_state: object,
    counters: dict[str, int],
    config_yaml: str,
) -> Path:
    """Write the state after `step` updates; all ranks call it, and it is on disk and the newest when they return.

    `data_state` is equal on all ranks.
    """
    is_writer = dist.get_rank() == 0
    target = folder.partial_folder(run_dir, step)
    if is_writer:
        folder.begin(run_dir, step)
    dist.barrier()
    with whole_parameters(model_chunks):
        model_state = _model_state(model_chunks)
        state = {
            "model": model_state,
            "optimizer": optimizer_state.for_saving(optimizer, model_state),
            "rng": _rng_entry(_rng_state()),
            "run": {
                "step": step,
                "counters": counters,
                "optimizer_steps": optimizer_state.steps_done(optimizer),
                "data_state": data_state,
                "config_yaml": config_yaml,
                "layout": _layout(),
                "has_ema": ema is not None,
            },
        }
        if ema is not None:
            state["ema"] = ema_state.for_saving(ema, model_state)
        force_all_tensors_to_non_fp8(model_state)  # a checkpoint is the same whatever the precision of the run
        # By default a process is started for this queue, which imports the whole program again and survives a kill;
        # results of a save that is waited for can stay in this process.
        filesystem_async._results_queue = queue.Queue()
        with _no_future_warnings():
            dist_checkpointing.save(state, str(target))
    if is_writer:
        folder.finish(run_dir, step, folder.records(target))
    dist.barrier()
    return folder.step_folder(run_dir, step)


def load(
    run_dir: str | Path,
    model_chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    ema: ema_state.Average | None,
) -> RunState | None:
    """Continue from the newest whole checkpoint of `run_dir`; None on all ranks when it has none.

    A damaged checkpoint is passed over with an error in the log, and the one before it is taken. Raises CheckpointError
    on all ranks when the newest whole one does not fit the model, naming the tensors, or when every one is damaged.
    """
    steps = _from_rank_0(lambda: folder.steps_to_try(run_dir))
    for step in steps:
        source = folder.step_folder(run_dir, step)
        fault = _from_rank_0(lambda source=source: folder.damage(source))
        if fault is None:
            fault, state = _attempt(source, model_chunks, optimizer, ema)
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


def _attempt(
    source: Path,
    model_chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    ema: ema_state.Average | None,
) -> tuple[str | None, RunState | None]:
    """Load one checkpoint: (None, its state), or what is wrong with it on some rank. All ranks return alike."""
    try:
        fault, state = None, _load(source, model_chunks, optimizer, ema)
    except CheckpointError:  # raised by all ranks alike
        raise
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is not an Exception
        logger.debug("Loading %s failed.", source, exc_info=True)
        fault, state = f"cannot be read ({_reason(error)})", None
    faults = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next((f for f in faults if f is not None), None), state


def _reason(error: BaseException) -> str:
    """Type and first sentence of an error; of its cause on the first failing rank where torch gathered several."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].split('. ')[0]}"


def _load(
    source: Path,
    model_chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    ema: ema_state.Average | None,
) -> RunState:
    run = _from_rank_0(lambda: dist_checkpointing.load_common_state_dict(str(source))["run"])
    if "data_state" not in run:
        raise CheckpointError(
            f"checkpoint {source} was written before replicas shared one order of the data, so its place in the data "
            "is unknown; start a new run from its weights: --checkpoint.init_from with another checkpoint.run_dir"
        )
    with whole_parameters(model_chunks):
        model_state = _model_state(model_chunks)
        request = {"model": model_state, "optimizer": optimizer_state.for_loading(optimizer, model_state)}
        loads_ema = ema is not None and run["has_ema"]
        if loads_ema:
            request["ema"] = ema_state.for_loading(ema, model_state)
        if run["layout"] == _layout():
            request["rng"] = _rng_entry(None)
        _check(request, source)
        with _no_future_warnings():
            loaded = dist_checkpointing.load(request, str(source), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
        for index, chunk in enumerate(model_chunks):
            chunk.module.load_state_dict(loaded["model"][f"model{index}"])
        optimizer_state.put(optimizer, loaded["optimizer"], run["optimizer_steps"])
        # parameters saved in bfloat16 are coarser than the main parameters that a float32 run goes on with
        publish_main_parameters(optimizer)
        if loads_ema:
            ema_state.put(ema, loaded["ema"])
        elif ema is not None:
            ema.reset()
            _say("the checkpoint %s has no moving average: it starts again from the loaded weights", source)
    if "rng" in loaded:
        _set_rng_state(loaded["rng"])
    else:
        _say("the parallel layout has changed since %s: random generators start again from the seed", source)
    return RunState(
        step=run["step"],
        counters=run["counters"],
        data_state=run["data_state"],
        config_yaml=run["config_yaml"],
        folder=source,
    )


def _model_state(model_chunks: Sequence[DistributedDataParallel]) -> ShardedStateDict:
    return {
        f"model{i}": chunk.module.sharded_state_dict(metadata=dict(optimizer_state.METADATA))
        for i, chunk in enumerate(model_chunks)
    }


def _check(request: ShardedStateDict, source: Path) -> None:
    """Raise CheckpointError on all ranks when a wanted tensor is missing or has another shape, or one is left over."""
    wanted = load_preprocess(request)[0]
    mine = {t.key: tuple(t.global_shape) for t in nested_values(wanted) if isinstance(t, ShardedTensor)}
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    expected = {key: shape for rank in of_ranks for key, shape in rank.items()}
    found = _from_rank_0(
        lambda: {t.key: tuple(t.global_shape) for t in dist_checkpointing.load_tensors_metadata(str(source)).values()}
    )
    faults = [f"{key} is missing (expected {shape})" for key, shape in expected.items() if key not in found]
    faults += [
        f"{key} has shape {found[key]} (expected {shape})"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    skips_ema = not any(key.startswith(ema_state.PREFIX) for key in expected)
    faults += [
        f"{key} {shape} is not part of the model (nothing expected)"
        for key, shape in found.items()
        if key not in expected and not (skips_ema and key.startswith(ema_state.PREFIX))
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"checkpoint {source} does not fit this model: {'; '.join(sorted(faults)[:5])}{more}; use the model and "
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


def _rng_entry(state: dict | None) -> ShardedObject:
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),))


def _rng_state() -> dict:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])


@contextlib.contextmanager
def _no_future_warnings() -> Iterator[None]:
    """megatron-core uses names that torch is going to drop; a user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _from_rank_0(look: object) -> object:
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
