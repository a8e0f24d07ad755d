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
from collections.abc import Iterable, Iterator
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
    for work, name in ((watchdog.run, "hang-watch"), (watchdog.talk, "hang-talk")):
        threading.Thread(target=work, name=name, daemon=True).start()
    try:
        yield
    finally:
        watchdog.done.set()
        faulthandler.cancel_dump_traceback_later()


class Watchdog:
    """The watch of one rank. `store`: of all ranks, None when it is alone.

    Whoever holds the store may be the one that is stopped, and then no call comes back: talking to it and watching are
    threads of their own.
    """

    def __init__(self, run_dir: Path, seconds: float, progress: Progress, store: dist.Store | None) -> None:
        self.done = threading.Event()
        self._run_dir, self._seconds, self._progress, self._store = run_dir, seconds, progress, store
        self._tick = min(max(seconds / _TICKS, _TICK_SECONDS[0]), _TICK_SECONDS[1])
        self._rank, self._world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._first_step: int | None = None
        self._excused = time.monotonic()  # before this moment nothing is held against this rank
        self._called = threading.Event()  # another rank has found a hang
        self._holder: dict | None = None  # the last word of rank 0, who may hold the store
        self._tell()

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
            is_hung = now - max(mark.since, self._excused) > limit
            if (is_hung or self._called.is_set()) and not self.done.is_set():
                self._end(mark, limit)

    def talk(self) -> None:
        """Tell the others how far this rank is, and hear whether one has found a hang, until `done`."""
        while self._store and not self.done.wait(self._tick):
            try:
                self._tell()
                if self._store.check(["beat/0"]):
                    self._holder = json.loads(self._store.get("beat/0"))
                if self._store.check(["claimed"]):
                    self._called.set()
            except dist.DistError:  # whoever held the store has gone; the failure watch ends this process
                return

    def _limit(self, mark: Mark) -> float:
        if mark.phase in LONG_PHASES:
            return PATIENCE * self._seconds
        if self._first_step is None:
            self._first_step = mark.step
        return self._seconds * (PATIENCE if mark.step == self._first_step else 1)

    def _tell(self) -> None:
        if self._store:
            me = {"host": socket.gethostname(), "pid": os.getpid(), "launcher": os.getppid()}
            self._store.set(f"beat/{self._rank}", json.dumps(me | self._progress.now._asdict()))

    def _end(self, mark: Mark, limit: float) -> None:
        """Write the stacks, together with the others if the store answers, and leave."""
        if self._store is None:
            folder = _folder(mark)
            self._dump(folder)
            self._speak(mark, limit, folder, {}, [])
        together = threading.Thread(target=self._end_together, args=(mark, limit), daemon=True)
        together.start()
        together.join(2 * (2 * self._tick + _ANSWER_SECONDS))
        if together.is_alive():
            self._end_without_store(mark, limit)
        time.sleep(failure.HEARD_SECONDS + failure.LEAVE_SECONDS + _ANSWER_SECONDS)  # until another one has spoken
        failure.leave(exit_codes.FAILED)

    def _end_together(self, mark: Mark, limit: float) -> None:
        """The first rank to come here finds the lagging ones and speaks; the others wait for it."""
        with contextlib.suppress(dist.DistError):
            if self._store.add("claimed", 1) == 1:
                folder = _folder(mark)
                self._store.set("folder", str(folder))
                self._dump(folder)
                beats, silent = self._answers()
                self._store.set("silent", json.dumps(silent))
                self._speak(mark, limit, folder, beats, silent)
            self._dump(Path(self._store.get("folder").decode()))
            self._store.set(f"dumped/{self._rank}", "")
            self._kill(self._beats(json.loads(self._store.get("silent"))))

    def _end_without_store(self, mark: Mark, limit: float) -> None:
        """The rank that holds the store is stopped or out of reach: each machine's first other rank says so."""
        folder = _folder(mark)
        self._dump(folder)
        beats = {0: self._holder} if self._holder else {}
        self._kill(beats)
        if os.environ.get("LOCAL_RANK", "0") == "0" or (self._is_beside(beats) and os.environ["LOCAL_RANK"] == "1"):
            self._speak(mark, limit, folder, beats, [0], has_store=False)

    def _speak(
        self, mark: Mark, limit: float, folder: Path, beats: dict[int, dict], silent: list[int], has_store: bool = True
    ) -> None:
        """Say and record who lags, end silent ranks beside this one, and leave."""
        lagging = _lagging(beats, silent)
        text = f"no step was finished for {limit:g} s (faults.hang_seconds): {_who(beats, silent, lagging, mark)}"
        file = str(folder)
        with contextlib.suppress(OSError):
            events.record(
                self._run_dir, "hang", step=mark.step + 1, seconds=limit, file=file, ranks=lagging, message=text
            )
        self._kill({rank: beats[rank] for rank in silent if rank in beats})
        sentence = f"{text}; what all threads were doing is in {self._run_dir / folder}"
        store = failure.shared_store("failure") if has_store else None
        failure.end(sentence, store, run_dir=self._run_dir)

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

    def _beats(self, ranks: Iterable[int]) -> dict[int, dict]:
        keys = {rank: f"beat/{rank}" for rank in ranks}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def _kill(self, silent: dict[int, dict]) -> None:
        """End silent ranks beside this one: a stopped process would keep the launcher waiting."""
        for rank, beat in silent.items():
            if rank != self._rank and self._is_beside({rank: beat}):
                with contextlib.suppress(OSError):
                    os.kill(beat["pid"], signal.SIGKILL)

    def _is_beside(self, beats: dict[int, dict]) -> bool:
        """Whether these are workers of this rank's own launcher."""
        here = socket.gethostname(), os.getppid()
        return bool(beats) and all((beat["host"], beat["launcher"]) == here for beat in beats.values())


def _folder(mark: Mark) -> Path:
    """Of a hang, in the run folder."""
    return Path(FOLDER) / f"step_{mark.step + 1:07d}-{time.strftime('%Y%m%d-%H%M%S')}"


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
