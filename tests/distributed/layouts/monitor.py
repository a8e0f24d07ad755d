"""Training with everything that is logged of each step, on packs of two groups; called in the workers."""

import dataclasses
from typing import Any
from unittest import mock

from megabagel.data.pack import Pack
from tests.distributed.layouts.packs import PackReader
from tests.distributed.layouts.run import make_trainer

STEPS = (("three images", "mixed", "frames", "no image"), ("many samples", "und only", "gen loss only", "mixed"))
GROUPS = ("even", "odd")  # of samples by their place in a pack


class GroupedReader(PackReader):
    """Packs whose samples are of two groups by turns."""

    def next_step(self) -> list[Pack]:
        packs = super().next_step()
        groups = [[GROUPS[place % 2] for place in range(len(pack.groups))] for pack in packs]
        return [dataclasses.replace(pack, groups=names) for pack, names in zip(packs, groups, strict=True)]

    def state_dict(self) -> dict:
        return {**super().state_dict(), "groups": list(GROUPS)}


def train(options: dict[str, Any]) -> list[dict[str, float | None]] | None:
    """What the logging rank would write of each step; None on the others."""
    with mock.patch("tests.distributed.layouts.run.PackReader", GroupedReader):
        trainer = make_trainer({**options, "optimizer.ema_decay": 0.5}, STEPS)
    values = [trainer.train_step() for _ in STEPS]
    return values if trainer.layout.is_last_stage_writer else None


def histograms(options: dict[str, Any]) -> dict[str, list[float]]:
    """Of gradients and parameters after a step."""
    trainer = make_trainer({**options, "logging.histogram_interval": 1}, STEPS)
    trainer.train_step()
    return trainer.measure_sizes()
