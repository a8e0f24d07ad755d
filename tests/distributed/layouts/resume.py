"""A run of the table's packs that is saved half-way, and runs that continue from there; called in the workers."""

from typing import Any

import torch
from torch import Tensor

from tests.distributed.layouts.packs import STEPS
from tests.distributed.layouts.run import StepValues, make_trainer

SAVED_AFTER = 2

# losses and gradient norm of the steps after the checkpoint; this rank's shards of main parameters and average
Continued = tuple[list[StepValues], list[Tensor]]


def _finish(trainer: Any) -> Continued:
    values = [trainer.train_step() for _ in STEPS[trainer.step :]]
    mains = [main for group in trainer.optimizer.param_groups for main in group["params"]]
    tensors = [tensor.detach().clone() for tensor in [*mains, *trainer.ema.shards]]
    return [StepValues(v["ce"], v["mse"], v["grad_norm"]) for v in values], tensors


def train_and_save(options: dict[str, Any], run_dir: str) -> Continued:
    """Train through all steps, with a checkpoint on the way."""
    trainer = make_trainer({**options, "checkpoint.run_dir": run_dir, "optimizer.ema_decay": 0.9})
    for _ in range(SAVED_AFTER):
        trainer.train_step()
    trainer.start_save()  # the checkpoint is written while training goes on
    continued = _finish(trainer)
    trainer.saver.wait()
    return continued


def resume(options: dict[str, Any], run_dir: str) -> Continued:
    """Start again from the checkpoint."""
    trainer = make_trainer({**options, "checkpoint.run_dir": run_dir, "optimizer.ema_decay": 0.9, "training.seed": 99})
    assert trainer.resume() and trainer.step == SAVED_AFTER
    torch.rand(3)  # disturbs the generators
    return _finish(trainer)
