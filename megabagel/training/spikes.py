"""Losses that jump: each is compared with the last ones; how often a run went back because of that.

Numbers and events only; going back to a checkpoint is the loop's business.
"""

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megabagel.config.schema import FaultsConfig
from megabagel.runtime import events
from megabagel.runtime.distributed import Layout
from megabagel.runtime.give_up import GiveUp

LOSSES = ("ce", "mse")
_NORMAL = 1.4826  # standard deviations of a normal distribution per median absolute deviation
_LEAST = 0.01  # of the median: the smallest deviation that is believed


@dataclass(frozen=True)
class Spike:
    """`value` of a loss, far above the `median` of the last ones, which vary by `deviation`."""

    loss: str
    value: float
    median: float
    deviation: float

    def __str__(self) -> str:
        times = (self.value - self.median) / self.deviation
        return f"{self.loss} is {self.value:.4g}, {times:.3g} deviations above the median {self.median:.4g}"


class Spikes:
    """Watches the losses of a run; every rank has one and makes the same calls."""

    def __init__(self, run_dir: str | Path, config: FaultsConfig, layout: Layout) -> None:
        self._run_dir, self._config, self._layout = Path(run_dir), config, layout
        self._windows = {name: deque(maxlen=config.spike_window) for name in LOSSES}
        self.found = self.rollbacks = 0
        self.rolled_back_to: int | None = None  # step of the last rollback's checkpoint

    def look(self, step: int, values: Mapping[str, float | None]) -> int | None:
        """Take note of the losses of `step`, which ranks of the last stage know; `step` on every rank if the run is to
        go back because of them, else None.

        Raises GiveUp on all ranks when that was done too often.
        """
        if self._config.spike_action == "none":
            return None
        spikes = [spike for name, value in self._known_to_all(values).items() if (spike := self._judge(name, value))]
        if not spikes:
            return None
        self.found += 1
        if self._layout.rank == 0:
            for spike in spikes:
                details = {"loss": spike.loss, "value": spike.value, "median": spike.median}
                events.record(self._run_dir, "spike", step=step, **details, deviation=spike.deviation)
            print(f"step {step}: {'; '.join(map(str, spikes))}", flush=True)
        if self._config.spike_action == "log":
            return None
        if self.rollbacks >= self._config.max_rollbacks:
            raise GiveUp(
                f"step {step}: {spikes[0]}, after {self.rollbacks} rollbacks (faults.max_rollbacks); lower "
                "optimizer.lr, look at the data, or raise faults.spike_threshold or faults.max_rollbacks."
            )
        return step

    def went_back(self, from_step: int, to_step: int, samples: int) -> None:
        """Take note of a rollback, which leaves out `samples`."""
        self.rollbacks, self.rolled_back_to = self.rollbacks + 1, to_step
        if self._layout.rank == 0:
            events.record(
                self._run_dir, "rollback", step=from_step, from_step=from_step, to_step=to_step, skipped_samples=samples
            )

    def values(self) -> dict[str, int]:
        """For the log."""
        return {"spikes": self.found, "rollbacks": self.rollbacks}

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists of them, equal on all ranks."""
        windows = {name: list(window) for name, window in self._windows.items()}
        return {**windows, **self.values(), "rolled_back_to": self.rolled_back_to}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, which is empty where nothing was watched."""
        self.load_windows(state)
        self.found, self.rollbacks = state.get("spikes", 0), state.get("rollbacks", 0)
        self.rolled_back_to = state.get("rolled_back_to")

    def load_windows(self, state: Mapping[str, Any]) -> None:
        """Only the losses of `state`, as it was before a spike."""
        for name, window in self._windows.items():
            window.clear()
            window.extend(state.get(name, []))

    def _judge(self, name: str, value: float) -> Spike | None:
        window, spike = self._windows[name], None
        if len(window) == window.maxlen:
            median = statistics.median(window)
            deviation = _NORMAL * statistics.median(abs(other - median) for other in window)
            deviation = max(deviation, _LEAST * abs(median))
            if value > median + self._config.spike_threshold * deviation:
                spike = Spike(name, value, median, deviation)
        window.append(value)  # it may be the new level: the median follows in the end
        return spike

    def _known_to_all(self, values: Mapping[str, float | None]) -> dict[str, float]:
        """The losses that some token carries, the same on all ranks; replicas have the same ones."""
        own = [-torch.inf if (value := values[name]) is None else value for name in LOSSES]
        group = self._layout.replica_device_group
        if group.size() > 1:
            known = torch.tensor(own, dtype=torch.float64, device=self._layout.device)
            dist.all_reduce(known, op=dist.ReduceOp.MAX, group=group)
            own = known.tolist()
        return {name: value for name, value in zip(LOSSES, own, strict=True) if value > -torch.inf}
