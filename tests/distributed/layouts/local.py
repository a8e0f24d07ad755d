"""Runs with local checkpoints: what the ranks do, called in the workers."""

from typing import Any

import torch
from torch import Tensor

from megabagel.training.loop import Trainer
from tests.distributed.layouts.run import StepValues, make_trainer

STEPS = (("mixed", "three images"),) * 4
SHARED, LOCAL = 1, (2, 3)  # steps after which there is a checkpoint of either kind

# step that the rank continued after; losses and gradient norm of the steps since; shards of parameters and average
Continued = tuple[int, list[StepValues], list[Tensor]]


def _settings(options: dict[str, Any], run_dir: str, local_dir: str) -> dict[str, Any]:
    folders = {"checkpoint.run_dir": run_dir, "checkpoint.local_dir": local_dir}
    return {**options, **folders, "optimizer.ema_decay": 0.9, "checkpoint.local_save_interval": 1}


def _finish(trainer: Trainer) -> Continued:
    begin = trainer.step
    values = [trainer.train_step() for _ in STEPS[begin:]]
    mains = [main for group in trainer.optimizer.param_groups for main in group["params"]]
    tensors = [tensor.detach().clone() for tensor in [*mains, *trainer.ema.shards]]
    return begin, [StepValues(v["ce"], v["mse"], v["grad_norm"]) for v in values], tensors


def train(options: dict[str, Any], run_dir: str, local_dir: str) -> Continued:
    """Train through all steps, saving on the way."""
    trainer = make_trainer(_settings(options, run_dir, local_dir), STEPS)
    while trainer.step < max(LOCAL):
        trainer.train_step()
        if trainer.step == SHARED:
            trainer.save()
        if trainer.step in LOCAL:
            trainer.start_local_save()
    trainer.saver.wait()
    return _finish(trainer)


def resume(options: dict[str, Any], run_dir: str, local_dir: str) -> Continued:
    """Continue from what is there."""
    trainer = make_trainer(_settings({**options, "training.seed": 99}, run_dir, local_dir), STEPS)
    assert trainer.resume()
    torch.rand(3)  # disturbs the generators
    return _finish(trainer)
