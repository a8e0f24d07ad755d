"""A pool of processes that measure and load samples; one that dies or hangs is replaced and its tasks are done again.

Each worker process has a thread here that feeds it. Which samples are wanted and when is decided in `reader.py`, how
they are made in `loader.py`, how they travel in `messages.py`.
"""

import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from megabagel.data.faults import DataError, Fault
from megabagel.data.worker_process import WorkerProcess

HANG_SECONDS = 30.0  # on one task
START_SECONDS = 180.0  # imports on a busy machine with a cold disk
DEPTH = 2  # tasks at a worker, so that it need not wait for the next one
STARTS, TRIES = 3, 2  # starts in a row that may fail; workers that a task may kill

Kind = Literal["measure", "load"]
_WAKE, _URGENCY = -1, {"measure": 0, "load": 1}  # planning waits for the first, training only later for the second


class Maker(Protocol):
    """What workers do. Picklable; the first two arguments of all of them are the group's index and a position."""

    def measure(self, group_index: int, position: int) -> Any: ...

    def load(self, group_index: int, position: int, planned: Any = None) -> Any: ...

    def origin(self, group_index: int, position: int) -> str: ...


class Pool(Protocol):
    """Turns tasks into futures. What the maker raises is raised by `result()`."""

    def submit(self, kind: Kind, *arguments) -> Future: ...

    def close(self) -> None: ...


def open_pool(
    maker: Maker, num_workers: int, *, hang_seconds: float = HANG_SECONDS, start_seconds: float = START_SECONDS
) -> Pool:
    """A pool of `num_workers` processes; 0: the caller's process does each task when its result is asked for.

    A task whose worker died or was silent for `hang_seconds` is done again by a new worker; if that dies too, the
    result is a Fault of kind worker_died. Results raise DataError once no worker can be started.
    """
    return _Processes(maker, num_workers, hang_seconds, start_seconds) if num_workers else _Here(maker)


class _Here:
    """The pool without processes."""

    def __init__(self, maker: Maker) -> None:
        self._maker = maker

    def submit(self, kind: Kind, *arguments) -> Future:
        return _Lazy(getattr(self._maker, kind), arguments)

    def close(self) -> None:
        """Nothing to end."""


class _Lazy(Future):
    """Runs when its result is asked for, in the thread that asks."""

    def __init__(self, call: Callable, arguments: tuple) -> None:
        super().__init__()
        self._call, self._arguments = call, arguments

    def result(self, timeout: float | None = None) -> Any:
        self._run()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._run()
        return super().exception(timeout)

    def _run(self) -> None:
        if self.done() or not self.set_running_or_notify_cancel():
            return
        try:
            self.set_result(self._call(*self._arguments))
        except Exception as error:
            self.set_exception(error)


@dataclass(order=True)
class _Task:
    urgency: int
    number: int
    kind: Kind = field(compare=False)
    arguments: tuple = field(compare=False)
    future: Future = field(compare=False)
    deaths: int = field(default=0, compare=False)


class _Processes:
    """The pool with processes."""

    def __init__(self, maker: Maker, num_workers: int, hang_seconds: float, start_seconds: float) -> None:
        self._maker = maker
        self._hang_seconds, self._start_seconds = hang_seconds, start_seconds
        self._tasks: queue.PriorityQueue[_Task] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._error: DataError | None = None
        self._closed = threading.Event()
        self._workers: dict[int, WorkerProcess] = {}  # by the number of their thread
        self._threads = [
            threading.Thread(target=self._serve, args=(i,), name=f"data worker {i}", daemon=True)
            for i in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, kind: Kind, *arguments) -> Future:
        """Queue a task; measuring goes before loading, else first come, first served."""
        task = _Task(_URGENCY[kind], next(self._numbers), kind, arguments, Future())
        self._tasks.put(task)
        if self._error is not None or self._closed.is_set():
            self._empty_queue()
        return task.future

    def close(self) -> None:
        """End the workers now. Unfinished tasks are cancelled."""
        self._closed.set()
        for worker in list(self._workers.values()):
            worker.hang_up()
        for thread in self._threads:
            while thread.is_alive():
                self._tasks.put(_Task(_WAKE, next(self._numbers), "measure", (), Future()))
                thread.join(0.05)
        self._empty_queue()

    def _empty_queue(self) -> None:
        """Give up what nobody will do."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._give_up(self._tasks.get_nowait())

    def _serve(self, place: int) -> None:
        """Feed one worker at a time until the pool is closed."""
        running: deque[_Task] = deque()
        worker = None
        try:
            while not self._closed.is_set():
                try:
                    if worker is None:
                        worker = self._start(place)
                        self._repeat(worker, running)
                    self._take(worker, running)
                    self._receive(worker, running)
                except (EOFError, OSError) as reason:  # it died, or is silent
                    self._workers.pop(place).kill()
                    worker = None
                    if not self._closed.is_set():
                        self._blame(running, isinstance(reason, TimeoutError))
        except Exception as error:  # else nobody would ever answer the futures
            if not self._closed.is_set():
                failed = DataError(f"the thread that feeds a data worker failed: {error!r}.")
                self._error = error if isinstance(error, DataError) else failed
        finally:
            if place in self._workers:
                self._workers.pop(place).kill()
            for task in running:
                self._give_up(task)
            if self._error is not None:
                self._empty_queue()

    def _take(self, worker: WorkerProcess, running: deque[_Task]) -> None:
        """Hand tasks on until the worker has enough; waits for one only if it has none."""
        while len(running) < DEPTH:
            try:
                task = self._tasks.get(block=not running)
            except queue.Empty:
                return
            if task.urgency == _WAKE or self._error is not None:
                self._give_up(task)
                return
            if task.future.set_running_or_notify_cancel():
                running.append(task)
                worker.send(task.kind, task.arguments, self._hang_seconds)

    def _repeat(self, worker: WorkerProcess, running: deque[_Task]) -> None:
        """Hand on what another worker left undone. Not in `_serve`, which would keep the last of it in memory."""
        for task in running:
            worker.send(task.kind, task.arguments, self._hang_seconds)

    def _receive(self, worker: WorkerProcess, running: deque[_Task]) -> None:
        """Pass on the answer to the oldest task, if there is one. Not in `_serve` either."""
        if running:
            good, result = worker.receive(self._hang_seconds)
            _answer(running.popleft().future, good, result)

    def _blame(self, running: deque[_Task], hung: bool) -> None:
        """The oldest task was being done when the worker died; after the last try its result is a fault."""
        if not running:
            return
        running[0].deaths += 1
        if running[0].deaths < TRIES:
            return
        task = running.popleft()
        reason = f"did not answer for {self._hang_seconds:g} s" if hung else "died"
        origin = self._maker.origin(*task.arguments[:2])
        message = f"a data worker process {reason} while it had to {task.kind} this row, {TRIES} times"
        _answer(task.future, True, Fault("worker_died", origin, message))

    def _start(self, place: int) -> WorkerProcess:
        """A worker that is ready. Raises DataError."""
        for _ in range(STARTS):
            if self._closed.is_set():
                break
            with contextlib.suppress(EOFError, OSError):
                self._workers[place] = WorkerProcess(self._maker)
                self._workers[place].begin(self._start_seconds)
                return self._workers[place]
            if place in self._workers:
                self._workers.pop(place).kill()
        raise DataError(
            f"{STARTS} data worker processes in a row ended before they read anything; if they printed no error, most "
            "likely for lack of host memory: lower data.num_workers or data.prefetch_mib."
        )

    def _give_up(self, task: _Task) -> None:
        """Answer the future of a task that will not be done."""
        if self._error is not None or not task.future.cancel():
            _answer(task.future, False, self._error or CancelledError())


def _answer(future: Future, good: bool, result: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled in this moment
        future.set_result(result) if good else future.set_exception(result)
