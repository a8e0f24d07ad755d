"""Which rank holds the others up: the time of each rank's own part of a step, gathered now and then and compared.

What a rank spends until it joins the sum of gradients over replicas is its own; what comes after is waiting for the
slowest. Ranks of one replica do wait for each other in it, so each also times a fixed product of matrices by itself.
"""

import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megabagel.config.schema import LoggingConfig
from megabagel.runtime import events
from megabagel.runtime.distributed import Layout

_LEAST = 0.05  # of the usual time of a step's work: what is lost must be more to be worth a word
_SIDE, _PRODUCTS, _TRIES = {"cuda": 4096, "cpu": 256}, 8, 3  # of the matrices that are multiplied
MEASURES = {  # what is compared, by name in the logs
    "work": "encoding, forward and backward",
    "data": "reading data",
    "device": "a fixed product of matrices",
}


@dataclass(frozen=True)
class RankTimes:
    """Seconds of one rank: half of its steps since the last report took less than `median`, one in 20 more than `p95`;
    by measure. A measure that the rank does not take is absent."""

    host: str
    stage: int  # of the pipeline; only ranks of the same stage have the same work
    median: dict[str, float]
    p95: dict[str, float]


@dataclass(frozen=True)
class Slowest:
    """The rank with the longest time of a measure, among those of its stage."""

    rank: int
    seconds: float
    usual: float  # median over the ranks

    @property
    def ratio(self) -> float:
        return self.seconds / self.usual if self.usual > 0 else 1.0


class Stragglers:
    """Measures this rank's part of every step; every rank has one and makes the same calls."""

    def __init__(self, stages: Sequence[nn.Module], layout: Layout, run_dir: str | Path, config: LoggingConfig) -> None:
        """`stages` share one TransformerConfig, whose hook of the gradients' reduction is led through here."""
        self._layout, self._run_dir = layout, Path(run_dir)
        self._interval, self._factor = config.straggler_interval, config.straggler_factor
        self._steps: dict[str, list[float]] = {"work": [], "data": []}
        self._start = self._arrival = _mark(layout.device)
        settings = stages[0].config
        self._reduce, settings.finalize_model_grads_func = settings.finalize_model_grads_func, self._arrive

    def start(self) -> None:
        """The forward pass begins."""
        self._start = _mark(self._layout.device)

    def report(self, step: int, times: Mapping[str, float]) -> dict[str, float]:
        """Take note of `step`, of which `times` has data_time and encode_time; values for the log when it is time to.

        Those are, by measure, how many times as long as usual the slowest rank takes.
        """
        if not self._interval:
            return {}
        self._steps["work"].append(times["encode_time"] + _seconds(self._start, self._arrival))
        if self._layout.is_source:
            self._steps["data"].append(times["data_time"])
        if step % self._interval:
            return {}
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, self._times())
        self._steps = {name: [] for name in self._steps}
        found = slowest_ranks(ranks)
        for measure, slowest in found.items():
            if is_straggler(found, measure, self._factor):
                self._say(step, measure, slowest, ranks[slowest.rank])
        return {f"straggler/{measure}": slowest.ratio for measure, slowest in found.items()}

    def _arrive(self, *arguments: object, **options: object) -> None:
        self._arrival = _mark(self._layout.device)
        self._reduce(*arguments, **options)

    def _times(self) -> RankTimes:
        steps = {name: sorted(values) for name, values in self._steps.items() if values}
        median = {name: statistics.median(values) for name, values in steps.items()}
        p95 = {name: values[int(0.95 * (len(values) - 1))] for name, values in steps.items()}
        device = time_products(self._layout.device)
        return RankTimes(socket.gethostname(), self._layout.pp_rank, {**median, "device": device}, p95)

    def _say(self, step: int, measure: str, slowest: Slowest, times: RankTimes) -> None:
        if self._layout.rank != 0:
            return
        events.record(
            self._run_dir,
            "straggler",
            step=step,
            measure=measure,
            slow_rank=slowest.rank,
            slow_host=times.host,
            seconds=slowest.seconds,
            p95=times.p95.get(measure),
            usual=slowest.usual,
        )
        print(
            f"step {step}: rank {slowest.rank} on {times.host} is slow: {MEASURES[measure]} takes "
            f"{slowest.seconds:.4g} s there, {slowest.ratio:.2f} times the {slowest.usual:.4g} s of most ranks",
            flush=True,
        )


def slowest_ranks(ranks: Sequence[RankTimes]) -> dict[str, Slowest]:
    """Of every measure, the rank that is slowest compared with the others of its stage."""
    found: dict[str, Slowest] = {}
    for measure in MEASURES:
        for stage in {times.stage for times in ranks}:
            among = {r: t.median[measure] for r, t in enumerate(ranks) if t.stage == stage and measure in t.median}
            if not among:
                continue
            rank = max(among, key=among.get)
            slowest = Slowest(rank, among[rank], statistics.median_low(among.values()))
            if measure not in found or slowest.ratio > found[measure].ratio:
                found[measure] = slowest
    return found


def is_straggler(found: Mapping[str, Slowest], measure: str, factor: float) -> bool:
    """Whether that measure's slowest rank takes `factor` times as long as usual, and costs the step something."""
    slowest = found[measure]
    lost = slowest.seconds - slowest.usual
    matters = measure == "device" or lost > _LEAST * found["work"].usual
    return matters and slowest.ratio > factor


def time_products(device: torch.device) -> float:
    """Seconds of a few products of two matrices on `device`, the best of some tries; nothing else runs meanwhile."""
    side = _SIDE[device.type]
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    best = float("inf")
    for _ in range(_TRIES + 1):  # the first one warms up
        start = _mark(device)
        for _ in range(_PRODUCTS):
            product = matrix @ matrix
        end = _mark(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, _seconds(start, end))
    del product
    return best


def _mark(device: torch.device) -> float | torch.cuda.Event:
    """This moment in the work of `device`."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Between two marks that the device has passed, as it has when a step's gradient norm is known."""
    return start.elapsed_time(end) / 1e3 if isinstance(start, torch.cuda.Event) else end - start
