"""A pool of processes that run one function after the other as the ranks of a process group of any size.

Imports are paid once. It knows nothing of models; what the ranks do is given to `run`.
"""

import importlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.distributed import forked

SETTLE_SECONDS = 2.0  # how long the other ranks may take to report after one has failed
DUMP_SECONDS = 1.0  # how long the workers may take to write their stacks


def _serve(*arguments: Any) -> None:
    importlib.import_module(forked.PRELOADED).serve(*arguments)  # not imported here: it sets its whole process up


class RanksFailedError(AssertionError):
    """Some ranks raised, died or did not finish; the message holds their tracebacks or stacks."""


class Pool:
    """`size` workers, forked from one process that has imported everything; started again after a failure."""

    def __init__(self, size: int):
        self.size = size
        self._context = multiprocessing.get_context("forkserver")
        forked.start_server()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._jobs = 0
        self._workers: list[multiprocessing.Process] = []
        self._connections: list[Connection] = []
        self._stacks = tempfile.TemporaryDirectory(prefix="stacks-")

    def run(self, function: Callable, *arguments: Any, processes: int, limit: float) -> list[Any]:
        """What `function(*arguments)` returns on each of `processes` ranks of a fresh process group, by rank.

        `function` must be importable by name. Raises RanksFailedError when a rank raises or dies, or when they take
        longer than `limit` seconds.
        """
        if not self._workers:
            self._start()
        self._jobs += 1
        connections = self._connections[:processes]
        for connection in connections:
            connection.send((f"job {self._jobs}", processes, function, arguments))
        results, errors = self._collect(connections, time.monotonic() + limit)
        if errors or len(results) < processes:
            stacks = "" if errors else self._dump_stacks(processes, limit)
            self.close()
            raise RanksFailedError(stacks + "\n".join(f"rank {rank}: {e}" for rank, e in sorted(errors.items())))
        for connection in connections:
            connection.send("leave")
        for connection in connections:
            connection.recv()
        return [results[rank] for rank in range(processes)]

    def close(self) -> None:
        """End all workers."""
        for process in self._workers:
            process.kill()
        for process in self._workers:
            process.join()
        for connection in self._connections:
            connection.close()
        self._workers, self._connections = [], []

    def _start(self) -> None:
        for rank in range(self.size):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(rank, theirs, self._store.port, self._stack_file(rank))
            )
            process.start()
            theirs.close()
            self._workers.append(process)
            self._connections.append(ours)

    def _collect(self, connections: list[Connection], deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
        """(results, errors) by rank until all have answered, or the deadline, or shortly after the first error."""
        results, errors = {}, {}
        open_ones = {connection: rank for rank, connection in enumerate(connections)}
        while open_ones:
            ready = wait(list(open_ones), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = open_ones.pop(connection)
                try:
                    error, value = connection.recv()
                except EOFError:
                    self._workers[rank].join(SETTLE_SECONDS)
                    error, value = f"the process died with exit code {self._workers[rank].exitcode}", None
                if error is None:
                    results[rank] = value
                else:
                    errors[rank] = error
                    deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
        return results, errors

    def _stack_file(self, rank: int) -> Path:
        return Path(self._stacks.name) / f"rank{rank}.txt"

    def _dump_stacks(self, processes: int, limit: float) -> str:
        for process in self._workers[:processes]:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(DUMP_SECONDS)
        stacks = [f"rank {rank} was at:\n{self._stack_file(rank).read_text()}" for rank in range(processes)]
        return f"not finished after {limit} s\n" + "\n".join(stacks)
