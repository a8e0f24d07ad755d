"""Expected effective training time of a long run with failures, and the checkpoint interval that makes it longest.

Monte Carlo over exponential failures of a whole cluster; the closed forms of Young (1974) and Daly (2006) stand beside.
"""

from dataclasses import dataclass, replace
from math import exp, sqrt

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """A run that fails. Times in seconds; `mtbf` of one GPU, everything that stops the job counted.

    `stall`: how long the loop stands still for a checkpoint; `durable`: until it can be loaded, training going on;
    `restart`: from a failure to the first new step, with finding it, a new node and loading. A failure during a
    restart starts that again.
    """

    gpus: int
    mtbf: float
    stall: float
    durable: float
    restart: float

    @property
    def mean_uptime(self) -> float:
        """Seconds between failures of the whole job."""
        return self.mtbf / self.gpus


@dataclass(frozen=True)
class Effective:
    """Shares of the time: useful, and by what the rest is lost."""

    useful: float
    stall: float
    repeated: float
    down: float
    failures_per_day: float


def simulate(schedule: Schedule, interval: float, failures: int = 20_000, seed: int = 0) -> Effective:
    """Run until so many failures, with `interval` seconds of training between checkpoints.

    Work since the last durable checkpoint is done again. Equal seeds draw equal failures.
    """
    draw = np.random.default_rng(seed)
    mean = schedule.mean_uptime
    up = draw.exponential(mean, failures)
    cycle = interval + schedule.stall
    # a checkpoint counts once it is durable, `durable` seconds after the loop went on
    kept = np.floor(np.maximum(up - schedule.durable, 0) / cycle)
    started = np.floor(up / cycle)
    # attempts to restart that themselves fail: geometric; each lasts an exponential time cut off at `restart`
    survives = exp(-schedule.restart / mean)
    retries = draw.geometric(survives, failures) - 1
    of_retry = mean - schedule.restart * survives / (1 - survives) if survives < 1 else 0.0
    down = schedule.restart + retries * of_retry
    total = float(up.sum() + down.sum())
    useful, stall = float(kept.sum()) * interval, float(started.sum()) * schedule.stall
    return Effective(
        useful / total, stall / total, (float(up.sum()) - useful - stall) / total, float(down.sum()) / total,
        86400 * float(failures + retries.sum()) / total,
    )  # fmt: skip


def young(schedule: Schedule) -> float:
    """Young's best interval in seconds: sqrt(2 stall M)."""
    return sqrt(2 * schedule.stall * schedule.mean_uptime)


def daly(schedule: Schedule) -> float:
    """Daly's higher-order estimate, "A higher order estimate of the optimum checkpoint interval", equation 37."""
    stall, mean = schedule.stall, schedule.mean_uptime
    if stall >= 2 * mean:
        return mean
    x = stall / (2 * mean)
    return sqrt(2 * stall * mean) * (1 + sqrt(x) / 3 + x / 9) - stall


def best_interval(schedule: Schedule, step: float, failures: int = 20_000) -> tuple[float, Effective]:
    """The interval, a whole number of steps, with most useful time; coarse to fine over equal draws."""
    low, high = max(step, daly(schedule) / 8), max(8 * step, daly(schedule) * 8)
    for _ in range(3):
        tried = np.unique(np.maximum(1, np.round(np.geomspace(low, high, 25) / step))) * step
        useful = [simulate(schedule, interval, failures).useful for interval in tried]
        best = int(np.argmax(useful))
        low, high = tried[max(0, best - 2)], tried[min(len(tried) - 1, best + 2)]
    return float(tried[best]), simulate(schedule, float(tried[best]), failures)


def at_sizes(schedule: Schedule, step: float, sizes: list[int]) -> list[tuple[int, float, float, Effective]]:
    """GPUs, best interval, Daly's interval and effective time, for each cluster size."""
    rows = []
    for gpus in sizes:
        one = replace(schedule, gpus=gpus)
        interval, effective = best_interval(one, step)
        rows.append((gpus, interval, daly(one), effective))
    return rows
