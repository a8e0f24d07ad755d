"""What is done to a run on purpose, by the ranks themselves: each ends or stops itself at a given place.

The place is a step and a phase of `runtime/progress.py`, so that no clock decides what is hit.
"""

import json
import os
import random
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megabagel.runtime import events
from megabagel.runtime.progress import START, Progress

PHASES = (START, "reading data", "encoding pictures", "in forward and backward", "updating weights", "saving")
_LONGEST_DELAY = 0.2  # seconds after the beginning of a save, which goes on in a thread


@dataclass(frozen=True)
class Strike:
    """`rank` gets `signal` when `phase` begins and `step` updates or more are done; `delay` seconds later in a save."""

    rank: int
    step: int
    phase: str
    signal: int
    delay: float = 0.0


def draw(seed: int, kills: int, stops: int, ranks: int, steps: int) -> list[Strike]:
    """So many kills and stops (SIGSTOP: the process stays, but does nothing) over a run of `steps`, in order."""
    chance, number = random.Random(seed), kills + stops
    stopped = set(chance.sample(range(number), stops))
    phases = [PHASES[i % len(PHASES)] for i in range(number)]
    chance.shuffle(phases)
    strikes = []
    for i in range(number):
        is_stop = i in stopped
        # a rank that is stopped while it starts is the business of torch's rendezvous
        phase = chance.choice(PHASES[1:]) if is_stop and phases[i] == START else phases[i]
        delay = chance.uniform(0, _LONGEST_DELAY) if phase == "saving" else 0.0
        step = 1 + i * max(1, steps - 3) // number
        strikes.append(
            Strike(chance.randrange(ranks), step, phase, signal.SIGSTOP if is_stop else signal.SIGKILL, delay)
        )
    return strikes


class Striker:
    """Of one rank. The strikes happen one after the other; a file tells later attempts which are over."""

    def __init__(self, run_dir: str | Path, strikes: list[Strike]) -> None:
        self._run_dir, self._strikes = Path(run_dir), strikes
        self._folder = self._run_dir / "chaos"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._rank = int(os.environ["RANK"])

    def install(self) -> None:
        """Let this process be struck from now on."""
        mark = Progress.mark
        self.look(None, START)

        def mark_and_look(progress: Progress, step: int, phase: str) -> None:
            mark(progress, step, phase)
            self.look(step, phase)

        Progress.mark = mark_and_look

    def look(self, step: int | None, phase: str) -> None:
        """Strike if it is time. `step`: None where it is not known yet."""
        number = next((i for i in range(len(self._strikes)) if not self._file(i).exists()), None)
        if number is None:
            return
        strike = self._strikes[number]
        if strike.rank != self._rank or strike.phase != phase or (step is not None and step < strike.step):
            return
        if strike.delay:
            threading.Thread(target=self._strike, args=(number,), daemon=True).start()
        else:
            self._strike(number)

    def _strike(self, number: int) -> None:
        strike = self._strikes[number]
        time.sleep(strike.delay)
        try:
            file = self._file(number).open("x")
        except FileExistsError:
            return
        with file:
            json.dump(asdict(strike), file)
        name = signal.Signals(strike.signal).name
        events.record(self._run_dir, "injected", number=number, signal=name, step=strike.step, phase=strike.phase)
        os.kill(os.getpid(), strike.signal)

    def _file(self, number: int) -> Path:
        return self._folder / f"strike_{number:02d}.json"
