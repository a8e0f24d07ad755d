"""When a run ends before its last step: all ranks agree on it between two steps. Ending is the training loop's matter.

Asked by a signal (`runtime/stop_signals.py`) to any rank, or by SLURM's time limit.
"""

import os
import signal
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from megabagel.config.schema import FaultsConfig
from megabagel.runtime.stop_signals import StopSignals

SIGNAL, TIME_LIMIT = "signal", "time_limit"  # reasons, by the names of `end` events
_TIME_LIMIT_CODE = 1000  # above all signals
_SAFETY = 2.0  # a save may take so much longer than the longest one so far


class StopReason(NamedTuple):
    """Why a run ends now: by the name of `end` events, and as the start of a sentence."""

    kind: str
    text: str


class Stop:
    """Every rank has one and asks `agreed` between the same steps."""

    def __init__(self, faults: FaultsConfig, signals: StopSignals, device: torch.device) -> None:
        self._signals, self._margin = signals, faults.time_limit_margin
        self._answer = torch.zeros((), dtype=torch.int32, device=device)
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._end = float(end) if end.isdigit() else None

    def agreed(self, seconds_needed: float) -> StopReason | None:
        """The same on all ranks, which all call it. `seconds_needed`: what another step and a save have taken so far.

        It is one all-reduce of four bytes over all ranks, where they wait for each other anyway.
        """
        self._signals.is_training = True
        code = int(self._signals.received or 0)
        if self._is_late(seconds_needed):
            code = _TIME_LIMIT_CODE
        dist.all_reduce(self._answer.fill_(code), op=dist.ReduceOp.MAX)
        code = int(self._answer)
        if code == 0:
            return None
        if code == _TIME_LIMIT_CODE:
            return StopReason(TIME_LIMIT, "the job's time limit is near")
        return StopReason(SIGNAL, f"{signal.Signals(code).name} was received")

    def _is_late(self, seconds_needed: float) -> bool:
        if self._end is None or self._margin is None:
            return False
        return time.time() > self._end - max(self._margin, _SAFETY * seconds_needed)
