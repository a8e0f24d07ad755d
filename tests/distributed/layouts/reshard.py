"""Runs that are saved in one layout and continued in another: what the ranks do, called in the workers.

State is compared under released tensor names, whole, so it does not depend on the checkpoint's own code.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megabagel.checkpoint.hf import stage_rules
from megabagel.checkpoint.names import export_shard
from megabagel.runtime.overlap import whole_parameters
from megabagel.training.loop import Trainer
from tests.distributed.layouts.run import StepValues, make_trainer

STEPS = (("mixed", "three images"),) * 5
SAVED_AFTER = 2
SETTINGS = {"optimizer.ema_decay": 0.9}
WHOLE = "whole.pt"  # what the saved run held: kind -> released name -> tensor

Shards = dict[str, dict[str, tuple[Tensor, int | None]]]  # kind -> released name -> (shard, split dimension)


@dataclass
class Continued:
    """What a rank reports after a checkpoint: counters, the next steps, and what its shards are unlike."""

    counters: tuple[int, int]  # steps, samples
    steps: list[StepValues]
    held: set[tuple[str, str]]  # (kind, released name)
    differing: set[tuple[str, str]]


def save(options: dict[str, Any], run_dir: str) -> Continued:
    """Train through all steps, with a checkpoint on the way and, beside it, all that it must hold."""
    trainer = make_trainer({**options, **SETTINGS, "checkpoint.run_dir": run_dir}, STEPS)
    for _ in range(SAVED_AFTER):
        trainer.train_step()
    trainer.start_save()  # the checkpoint is written while training goes on
    shards = _held(trainer)
    _write_whole(shards, Path(run_dir) / WHOLE)
    continued = Continued((trainer.step, trainer.samples), _finish(trainer), _keys(shards), set())
    trainer.saver.wait()
    return continued


def load(options: dict[str, Any], run_dirs: list[str]) -> list[Continued]:
    """Continue each of the runs in turn, in one trainer whose state is ruined before every load."""
    trainer = make_trainer({**options, **SETTINGS, "training.seed": 99}, STEPS)
    reports = []
    for run_dir in run_dirs:
        _ruin(trainer)
        trainer.config.checkpoint.run_dir = run_dir
        assert trainer.resume()
        shards = _held(trainer)
        counters = (trainer.step, trainer.samples)
        differing = _differing(shards, Path(run_dir) / WHOLE)
        reports.append(Continued(counters, _finish(trainer), _keys(shards), differing))
    return reports


def _finish(trainer: Trainer) -> list[StepValues]:
    values = [trainer.train_step() for _ in STEPS[trainer.step :]]
    return [StepValues(v["ce"], v["mse"], v["grad_norm"]) for v in values]


@torch.no_grad()
def _ruin(trainer: Trainer) -> None:
    """Nothing that a load leaves out can go unnoticed; in a new trainer there are no moments yet."""
    for part in trainer.ema.optimizers:
        for state in part.optimizer.state.values():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment].fill_(torch.nan)
    mains = [main for group in trainer.optimizer.param_groups for main in group["params"]]
    for tensor in [*mains, *trainer.ema.shards]:
        tensor.fill_(torch.nan)
    with whole_parameters(trainer.stages):
        for stage in trainer.stages:
            for parameter in stage.parameters():
                parameter.fill_(torch.nan)
    trainer.step = trainer.samples = -1
    torch.rand(3)  # disturbs the generators


@torch.no_grad()
def _held(trainer: Trainer) -> Shards:
    """Weights, main parameters, moments and average of this rank's parameters; collective over data-parallel ranks."""
    kinds = {"main": {}, "exp_avg": {}, "exp_avg_sq": {}, "ema": {}}
    averages = trainer.ema.by_parameter()
    for part in trainer.ema.optimizers:
        for parameter, values in _undivided(part, averages).items():
            for kind, value in zip(kinds, values, strict=True):
                kinds[kind][parameter] = value.view(parameter.shape)
    shards = {kind: {} for kind in ("weights", *kinds)}
    with whole_parameters(trainer.stages):
        for stage in trainer.stages:
            rules = stage_rules(stage.module)
            for name, parameter in stage.module.named_parameters():
                values = {"weights": parameter}
                if parameter.requires_grad:
                    values |= {kind: of_parameter[parameter] for kind, of_parameter in kinds.items()}
                for kind, value in values.items():
                    for released, (shard, dim) in export_shard(value, rules[name]).items():
                        shards[kind][released] = shard.clone(), dim  # a view is sent with all that it is a view of
    return shards


def _undivided(part: DistributedOptimizer, averages: dict[Tensor, tuple[Tensor, int, int]]) -> dict[Tensor, Tensor]:
    """Parameter -> [4, number of its elements]: main parameter, moments and average, of all data-parallel shards."""
    parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
    values = torch.zeros(4, sum(parameter.numel() for parameter in parameters))
    whole = dict(zip(parameters, values.split([p.numel() for p in parameters], dim=1), strict=True))
    for parameter, (group, order) in part.model_param_group_index_map.items():
        main = part.optimizer.param_groups[group]["params"][order]
        state = part.optimizer.state[main]
        average, start, end = averages[parameter]
        for row, shard in zip(whole[parameter], (main, state["exp_avg"], state["exp_avg_sq"], average), strict=True):
            row[start:end] = shard
    dist.all_reduce(values, group=part.data_parallel_group)  # shards are disjoint: the sum with zeros is exact
    return whole


def _write_whole(shards: Shards, path: Path) -> None:
    """Join the shards of all ranks; copies of one shard must be equal."""
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (parallel_state.get_tensor_model_parallel_rank(), shards))
    parts: dict[str, dict[str, dict[int, Tensor]]] = {kind: {} for kind in shards}
    dims = {}
    for tp_rank, held in of_ranks:
        for kind, of_kind in held.items():
            for name, (shard, dim) in of_kind.items():
                dims[name] = dim
                first = parts[kind].setdefault(name, {}).setdefault(0 if dim is None else tp_rank, shard)
                assert torch.equal(first, shard), f"ranks hold different copies of {kind} of {name}"
    if dist.get_rank() == 0:
        whole = {
            kind: {
                name: of_name[0] if dims[name] is None else torch.cat([of_name[r] for r in sorted(of_name)], dims[name])
                for name, of_name in of_kind.items()
            }
            for kind, of_kind in parts.items()
        }
        torch.save(whole, path)
    dist.barrier()


def _differing(shards: Shards, path: Path) -> set[tuple[str, str]]:
    """What of this rank's shards is not, to the bit, its part of the whole tensors at `path`."""
    whole = torch.load(path, mmap=True)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    wrong = set()
    for kind, name in _keys(shards):
        shard, dim = shards[kind][name]
        expected = whole[kind].get(name)
        if expected is not None and dim is not None:
            expected = expected.narrow(dim, tp_rank * shard.shape[dim], shard.shape[dim])
        if expected is None or not torch.equal(expected, shard):
            wrong.add((kind, name))
    return wrong


def _keys(shards: Shards) -> set[tuple[str, str]]:
    return {(kind, name) for kind, of_kind in shards.items() for name in of_kind}
