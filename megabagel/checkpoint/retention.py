"""Which checkpoints of a run stay when a new one is whole, and the removal of the others.

It never removes the newest whole one, nor one that `folder.damage` complains of: what is wrong there is for a person.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megabagel.checkpoint import folder
from megabagel.config.schema import CheckpointConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keep:
    """What stays: the newest `last`, every step that `every` divides, the `best` by `metric`. All None: everything."""

    last: int | None = None
    every: int | None = None
    best: int | None = None
    metric: str = ""  # lower is better

    @classmethod
    def of(cls, config: CheckpointConfig) -> "Keep":
        return cls(config.keep_last, config.keep_every, config.keep_best, config.best_metric)


EVERYTHING = Keep()


def superfluous(checkpoints: Mapping[int, Mapping[str, float]], keep: Keep) -> list[int]:
    """Steps that no rule of `keep` holds, oldest first; `checkpoints`: the metrics of every whole one by step.

    The newest is never among them. A checkpoint whose metric is missing or not finite is none of the best.
    """
    if keep.last is None and keep.every is None and keep.best is None:
        return []
    steps = sorted(checkpoints)
    stays = set(steps[-(keep.last or 1) :])
    if keep.every is not None:
        stays |= {step for step in steps if step % keep.every == 0}
    if keep.best is not None:
        values = {step: checkpoints[step].get(keep.metric, math.nan) for step in steps}
        rated = sorted((step for step in steps if math.isfinite(values[step])), key=lambda step: (values[step], step))
        stays |= set(rated[: keep.best])
    return [step for step in steps if step not in stays]


def apply(run_dir: str | Path, keep: Keep) -> list[int]:
    """Remove what is superfluous among the whole checkpoints up to the latest; returns their steps.

    Newer ones, which lie there after the latest file was set back, stay. A removal that fails is logged and tried again
    at the next save: it must not stop a run.
    """
    whole = {}
    for step in folder.steps_to_try(run_dir):
        path = folder.step_folder(run_dir, step)
        if folder.damage(path) is None:
            whole[step] = folder.metrics_of(path)
    removed = []
    for step in superfluous(whole, keep):
        try:
            folder.remove(run_dir, step)
            removed.append(step)
        except OSError as error:
            logger.warning("Checkpoint %s could not be removed (%s).", folder.step_folder(run_dir, step), error)
    return removed
