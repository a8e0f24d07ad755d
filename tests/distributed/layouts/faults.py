"""Mistakes that the comparison must notice, and processes that misbehave: so that the table is not vacuous.

Each fault is a context manager around the training of one rank.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from unittest import mock

import torch
import torch.distributed as dist

from megabagel.training.loop import Trainer


@contextlib.contextmanager
def _scaled_gradients(trainer: Trainer, among: str, factor: float) -> Iterator[None]:
    """On rank 1, gradients of the parameters with `among` in their names are `factor` times what they should be."""
    for stage in trainer.stages if dist.get_rank() == 1 else []:
        for name, parameter in stage.module.named_parameters():
            if among in name:
                parameter.register_hook(lambda gradient: gradient * factor)
    yield


FAULTS: dict[str, Callable[[Trainer], AbstractContextManager]] = {
    "gradients of one rank are 0.1 % too large": lambda trainer: _scaled_gradients(trainer, "", 1.001),
    "one bias of the ViT gets a hundredth too much": lambda trainer: _scaled_gradients(trainer, "0.mlp.fc2.bias", 1.01),
    "parts of the ViT's gradients are not summed over tensor-parallel ranks": lambda _: mock.patch(
        "megabagel.training.wrap.sum_partial_gradients"
    ),
    "norms are not summed over tensor-parallel ranks": lambda _: mock.patch.object(
        # the package has a function of the module's name
        sys.modules["megatron.core.distributed.finalize_model_grads"],
        "_allreduce_non_tensor_model_parallel_grads",
    ),
}


def nothing() -> int:
    """-> the number of ranks that meet."""
    ones = torch.ones(1)
    dist.all_reduce(ones)
    return int(ones)


def fail_on_rank_1() -> None:
    """The others wait for it."""
    if dist.get_rank() == 1:
        raise KeyError("what rank 1 has to say")
    nothing()


def die_on_rank_1() -> None:
    """Without a word."""
    if dist.get_rank() == 1:
        os._exit(3)
    nothing()


def hang_on_rank_1() -> None:
    """The others wait for it."""
    if dist.get_rank() == 1:
        time.sleep(600)
    nothing()
