"""Spreads stretches of rows over processes and tells how many rows are done."""

import multiprocessing
import queue
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from megabagel.data.faults import DataError
from tools.latents.encode import Settings, Stretch, StretchEncoder

STRETCHES_PER_PROCESS = 4  # fewer: unevenly done; more: smaller shards
_POLL_SECONDS = 1.0


def encode_all(settings: Settings, stretches: list[Stretch], report: Callable[[int], None]) -> None:
    """Store all pictures of the stretches. Raises DataError when a process ends early; what is done stays done."""
    _end_on_terminate()
    if settings.processes == 1:
        encoder = StretchEncoder(settings)
        for stretch in stretches:
            encoder.run(stretch, report)
        return
    context = multiprocessing.get_context("spawn")  # a GPU does not survive a fork
    done = context.Queue()
    pieces = _cut(stretches, settings.processes)
    shares = [pieces[i :: settings.processes] for i in range(settings.processes)]
    processes = [
        context.Process(target=_work, args=(settings, share, i, done), daemon=True) for i, share in enumerate(shares)
    ]
    for process in processes:
        process.start()
    try:
        _follow(processes, done, report)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _cut(stretches: list[Stretch], processes: int) -> list[Stretch]:
    """The same rows in pieces of about one length."""
    rows = sum(stretch.stop - stretch.first for stretch in stretches)
    length = max(1, -(-rows // (processes * STRETCHES_PER_PROCESS)))
    return [
        Stretch(stretch.group, first, min(first + length, stretch.stop), stretch.kinds)
        for stretch in stretches
        for first in range(stretch.first, stretch.stop, length)
    ]


def _work(settings: Settings, share: list[Stretch], number: int, done: multiprocessing.Queue) -> None:
    _end_on_terminate()
    encoder = StretchEncoder(settings, number)
    for stretch in share:
        encoder.run(stretch, done.put)


def _end_on_terminate() -> None:
    """So that rows that are finished are written first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _follow(processes: list[BaseProcess], done: multiprocessing.Queue, report: Callable[[int], None]) -> None:
    while True:
        running = any(process.is_alive() for process in processes)
        try:
            while True:
                report(done.get(timeout=_POLL_SECONDS if running else 0.01))
        except queue.Empty:
            pass
        for number, process in enumerate(processes):
            if process.exitcode:
                raise DataError(
                    f"encoding process {number} ended with code {process.exitcode}, perhaps for lack of memory; run "
                    "the same command again to go on, with a smaller --processes if that was it."
                )
        if not running:
            return
