"""Ends a run that hangs: a thread per rank that looks whether the rank gets on, and with the others finds who does not.

Every rank writes what its threads are doing to RUN_DIR/hangs, one says which ranks lag, and all leave with an error, so
that the launcher starts again. It works while the main thread sits in a collective, and when a rank is stopped.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megabagel.runtime import events, exit_codes, failure
from megabagel.runtime.progress import START, Mark, Progress

FOLDER = "hangs"  # in the run folder
PATIENCE = 4  # so many times as long may what is in LONG_PHASES take, and the first step
LONG_PHASES = (START, "validating", "sampling", "saving")
_TICKS = 10  # looks per time limit
_TICK_SECONDS = (0.5, 10.0)  # least and most
_ANSWER_SECONDS = 10.0  # beyond two ticks, for a rank to write its stacks; after that it counts as silent
_MARGIN_SECONDS = 300.0
_LEAST_TIMEOUT = timedelta(minutes=30)


def group_timeout(seconds: float | None) -> timedelta:
    """For process groups: the watchdog, which has more to say, comes first."""
    return max(_LEAST_TIMEOUT, timedelta(seconds=PATIENCE * (seconds or 0) + _MARGIN_SECONDS))


@contextlib.contextmanager
def watching(run_dir: str | Path, seconds: float | None, progress: Progress) -> Iterator[None]:
    """While the body runs, the process ends when `progress` has no new mark for `seconds`; None: never."""
    if seconds is None:
        yield
        return
    watchdog = Watchdog(Path(run_dir), seconds, progress, failure.shared_store("hang"))
    watchdog.tell()
    thread = threading.Thread(target=watchdog.run, name="hang-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watchdog.done.set()
        faulthandler.cancel_dump_traceback_later()


class Watchdog:
    """The watch of one rank. `store`: of all ranks, None when it is alone."""

    def __init__(self, run_dir: Path, seconds: float, progress: Progress, store: dist.Store | None) -> None:
        self.done = threading.Event()
        self._run_dir, self._seconds, self._progress, self._store = run_dir, seconds, progress, store
        self._tick = min(max(seconds / _TICKS, _TICK_SECONDS[0]), _TICK_SECONDS[1])
        self._rank, self._world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._first_step: int | None = None
        self._excused = time.monotonic()  # before this moment nothing is held against this rank

    def run(self) -> None:
        """Look until `done`, or until there is a hang."""
        looked = time.monotonic()
        while not self.done.wait(self._tick):
            now, mark = time.monotonic(), self._progress.now
            if now - looked > 3 * self._tick + _ANSWER_SECONDS:  # the process itself was stopped for a while
                self._excused = now
            looked = now
            limit = self._limit(mark)
            # in case that this thread cannot run either, as when native code keeps Python's lock
            faulthandler.dump_traceback_later(PATIENCE * self._seconds + _MARGIN_SECONDS, exit=True)
            try:
                self.tell()
                is_hung = now - max(mark.since, self._excused) > limit
                if not self.done.is_set() and (is_hung or (self._store and self._store.check(["claimed"]))):
                    self._end(mark, limit)
            except dist.DistError:  # whoever held the store has gone; the failure watch ends this process
                return

    def _limit(self, mark: Mark) -> float:
        if mark.phase in LONG_PHASES:
            return PATIENCE * self._seconds
        if self._first_step is None:
            self._first_step = mark.step
        return self._seconds * (PATIENCE if mark.step == self._first_step else 1)

    def tell(self) -> None:
        """Let the others know who and where this rank is."""
        if self._store:
            me = {"host": socket.gethostname(), "pid": os.getpid(), "launcher": os.getppid()}
            beat = me | self._progress.now._asdict()
            self._store.set(f"beat/{self._rank}", json.dumps(beat))

    def _end(self, mark: Mark, limit: float) -> None:
        """Write the stacks; the first rank to come here finds the lagging ones and speaks."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = Path(FOLDER) / f"step_{mark.step + 1:07d}-{stamp}"
        if self._store is None:
            self._dump(folder)
            beats, silent = {}, []
        elif self._store.add("claimed", 1) == 1:
            self._store.set("folder", str(folder))
            self._dump(folder)
            beats, silent = self._answers()
            self._store.set("silent", json.dumps(silent))
        else:
            folder = Path(self._store.get("folder").decode())
            self._dump(folder)
            self._store.set(f"dumped/{self._rank}", "")
            silent = json.loads(self._store.get("silent"))
            self._kill(self._beats(silent))
            time.sleep(failure.HEARD_SECONDS + failure.LEAVE_SECONDS + _ANSWER_SECONDS)
            failure.leave(exit_codes.FAILED)
        lagging = _lagging(beats, silent)
        text = f"no step was finished for {limit:g} s (faults.hang_seconds): {_who(beats, silent, lagging, mark)}"
        file = str(folder)
        with contextlib.suppress(OSError):
            events.record(
                self._run_dir, "hang", step=mark.step + 1, seconds=limit, file=file, ranks=lagging, message=text
            )
        self._kill({rank: beats[rank] for rank in silent if rank in beats})
        sentence = f"{text}; what all threads were doing is in {self._run_dir / folder}"
        failure.end(sentence, failure.shared_store("failure"), run_dir=self._run_dir)

    def _dump(self, folder: Path) -> None:
        with contextlib.suppress(OSError):  # leaving comes first
            (self._run_dir / folder).mkdir(parents=True, exist_ok=True)
            with (self._run_dir / folder / f"rank_{self._rank:05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)

    def _answers(self) -> tuple[dict[int, dict], list[int]]:
        """What each rank has last told of itself, and the ranks that do not answer any more."""
        waiting = set(range(self._world_size)) - {self._rank}
        deadline = time.monotonic() + 2 * self._tick + _ANSWER_SECONDS
        while waiting and time.monotonic() < deadline:
            time.sleep(0.2)
            waiting = {rank for rank in waiting if not self._store.check([f"dumped/{rank}"])}
        return self._beats(range(self._world_size)), sorted(waiting)

    def _beats(self, ranks: Iterator[int] | list[int] | range) -> dict[int, dict]:
        keys = {rank: f"beat/{rank}" for rank in ranks}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def _kill(self, silent: dict[int, dict]) -> None:
        """End silent ranks beside this one: a stopped process would keep the launcher waiting."""
        for rank, beat in silent.items():
            beside = (beat["host"], beat["launcher"]) == (socket.gethostname(), os.getppid())
            if rank != self._rank and beside:
                with contextlib.suppress(OSError):
                    os.kill(beat["pid"], signal.SIGKILL)


def _lagging(beats: dict[int, dict], silent: list[int]) -> list[int]:
    """The silent ranks, else those that are least far; none when all are equally far."""
    numbers = {beat["number"] for beat in beats.values()}
    if silent or len(numbers) < 2:
        return silent
    return [rank for rank, beat in beats.items() if beat["number"] == min(numbers)]


def _who(beats: dict[int, dict], silent: list[int], lagging: list[int], mark: Mark) -> str:
    if not lagging:
        return f"in step {mark.step + 1} {'all ranks are' if beats else 'this process is'} {mark.phase}"
    names = ", ".join(_name(rank, beats.get(rank)) for rank in lagging[:4])
    more = f" and {len(lagging) - 4} more" if len(lagging) > 4 else ""
    if silent:
        return f"stopped, dead or out of reach is {names}{more}"
    return f"{names}{more} is behind the others, which are in step {mark.step + 1} {mark.phase}"


def _name(rank: int, beat: dict | None) -> str:
    if beat is None:
        return f"rank {rank}"
    return f"rank {rank} on {beat['host']} (in step {beat['step'] + 1} {beat['phase']})"
