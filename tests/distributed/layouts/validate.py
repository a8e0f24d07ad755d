"""Runs with validation in between on this rank, on the table's packs or on files; called in the workers.

Nothing here judges.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megabagel.config.checks import check_config
from megabagel.config.errors import ConfigError
from megabagel.config.load import load_config
from megabagel.data.faults import DataError
from megabagel.data.pack import Pack
from megabagel.data.steps import EndOfData
from megabagel.packing.geometry import geometry_of
from megabagel.runtime.distributed import initialize
from megabagel.training import setup
from megabagel.training.metrics_file import read_metrics
from megabagel.training.readers import Sources
from tests.distributed.layouts.packs import SPECIAL, PackReader
from tests.distributed.layouts.run import StepValues, make_trainer

TRAINED = (("three images", "und only", "mixed", "frames"),) * 2
HELD_OUT = (TRAINED[0], ("no loss", "many samples", "no image, no loss", "gen loss only"))
GROUPS = ("even", "odd")  # of samples by their place in a pack


class HeldOutReader(PackReader):
    """Packs of two groups, which end."""

    def next_step(self) -> list[Pack]:
        if self._read == len(self._steps):
            raise EndOfData("the packs were read")
        packs = super().next_step()
        groups = [[GROUPS[place % 2] for place in range(len(pack.groups))] for pack in packs]
        return [dataclasses.replace(pack, groups=names) for pack, names in zip(packs, groups, strict=True)]

    def state_dict(self) -> dict:
        return {**super().state_dict(), "groups": list(GROUPS), "num_rows": [1, 1]}


@dataclasses.dataclass
class Validated:
    """What a rank hands back."""

    steps: list[StepValues]
    tensors: list[Tensor]  # main parameters and average; what the generators would give next
    measured: list[dict[str, float | None]]  # before each step


def train(options: dict[str, Any], held_out: Sequence[Sequence[str]] = ()) -> Validated:
    """Train through TRAINED; where there are kinds of held-out packs, measure before every step."""

    def open_held_out(sources: Sources) -> PackReader:
        geometry, layout = geometry_of(sources.config.model, SPECIAL), sources.layout
        return HeldOutReader(held_out, layout.dp_rank, layout.dp_size, geometry, sources.tile, sources.total_length)

    validation = {"validation.interval": 1, "validation.weights": "both"} if held_out else {}
    with mock.patch.object(Sources, "open_held_out", open_held_out):
        trainer = make_trainer({**options, **validation, "optimizer.ema_decay": 0.5}, TRAINED)
    measured, steps = [], []
    for _ in TRAINED:
        if held_out:
            measured.append(trainer.validation.measure())
        values = trainer.train_step()
        steps.append(StepValues(values["ce"], values["mse"], values["grad_norm"]))
    mains = [main for group in trainer.optimizer.param_groups for main in group["params"]]
    tensors = [t.detach().clone() for t in [*mains, *trainer.ema.shards]]
    return Validated(steps, [*tensors, torch.rand(3)], measured)


def refusal(arguments: list[str]) -> str:
    """What `run` raises instead."""
    try:
        run(arguments)
    except (ConfigError, DataError) as error:
        return str(error)
    raise AssertionError("nothing was refused")


def run(arguments: list[str]) -> list[dict[str, float | None]]:
    """A whole run as the command line starts it; its metrics."""
    config = load_config(arguments)
    layout = initialize(config.parallel, config.training.seed)
    check_config(config, layout.world_size)
    setup.build_trainer(config, layout).run()
    return read_metrics(Path(config.checkpoint.run_dir)) if layout.is_last_stage_writer else []
