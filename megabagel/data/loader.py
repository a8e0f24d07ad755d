"""From a position in a group's order to a planned sample, here or in worker processes.

Every random choice is keyed by the sample, so where and when a sample is loaded changes nothing. Packing is elsewhere.
"""

import multiprocessing
import os
import sys
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait

from megabagel.config.datasets import GroupConfig
from megabagel.data.faults import DataError, DataFault, Fault
from megabagel.data.order import GroupOrder
from megabagel.data.sources import open_source
from megabagel.data.text import Tokenizer
from megabagel.packing.geometry import Geometry
from megabagel.packing.splits import PlannedSample, draw_dropout, plan_sample

SAMPLES_AHEAD = 8  # per worker and group


@dataclass
class SampleMaker:
    """Loads samples of all groups in the calling process."""

    groups: dict[str, GroupConfig]
    tokenizer: Tokenizer
    geometry: Geometry
    dropout: dict[str, float]  # item type -> probability
    seed: int

    def __post_init__(self) -> None:
        self.sources = [open_source(name, group, self.tokenizer, self.seed) for name, group in self.groups.items()]
        self.orders = [GroupOrder(s.blocks, self.seed, i, s.window) for i, s in enumerate(self.sources)]

    def load(self, group_index: int, position: int) -> PlannedSample | Fault:
        """The sample at `position` of a group's order, or why it cannot be used."""
        source = self.sources[group_index]
        visit, row = self.orders[group_index].row(position)
        try:
            sample = source.sample(row, (group_index, row, visit))
            dropped = draw_dropout(sample, self.dropout, self.seed)
            return plan_sample(sample, self.geometry, dropped, seed=self.seed)
        except DataFault as fault:
            return Fault(fault.kind, source.origin(row), str(fault))
        except MemoryError:
            raise
        except Exception as error:  # a row of an unforeseen shape must not end a run of weeks
            message = str(error).removeprefix(f"{source.origin(row)}: ")
            return Fault("bad_row", source.origin(row), message if isinstance(error, ValueError) else f"{error!r}")


_maker: SampleMaker  # of this worker process


def _start_worker(maker: SampleMaker) -> None:
    global _maker
    _maker = maker
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed trainer cannot stop its workers, so they watch it."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _load_in_worker(group_index: int, position: int) -> PlannedSample | Fault:
    return _maker.load(group_index, position)


class SampleLoader:
    """Loads each group's positions first, first + step, ... in order; with workers, some samples ahead."""

    def __init__(self, maker: SampleMaker, num_workers: int, first: int, step: int) -> None:
        self._maker = maker
        self._first, self._step = first, step
        self._ahead = SAMPLES_AHEAD * num_workers
        self._pending: list[deque[Future]] = [deque() for _ in maker.sources]
        self.counts = [0] * len(maker.sources)  # samples handed out of each group, bad ones included
        self._pool = None
        if num_workers:
            # Not fork: the trainer has threads and perhaps a GPU. The fork server imports once for all workers.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__, *_main_module()])
            self._pool = ProcessPoolExecutor(num_workers, context, _start_worker, (maker,))

    def next(self, group_index: int) -> tuple[int, PlannedSample | Fault]:
        """Position and sample (or fault) that is next in the group."""
        count = self.counts[group_index]
        self.counts[group_index] = count + 1
        position = self._first + count * self._step
        if self._pool is None:
            return position, self._maker.load(group_index, position)
        pending = self._pending[group_index]
        try:
            while len(pending) < self._ahead:
                ahead = self._first + (count + len(pending)) * self._step
                pending.append(self._pool.submit(_load_in_worker, group_index, ahead))
            return position, pending.popleft().result()
        except BrokenProcessPool:
            raise _worker_died() from None

    def load(self, references: list[tuple[int, int]]) -> list[PlannedSample | Fault]:
        """Samples at given (group, position), in order; for resume."""
        if self._pool is None:
            return [self._maker.load(*reference) for reference in references]
        try:
            futures = [self._pool.submit(_load_in_worker, *reference) for reference in references]
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise _worker_died() from None

    def seek(self, counts: list[int]) -> None:
        """Continue as if `counts[g]` samples of group g had been handed out."""
        self.counts = list(counts)
        for pending in self._pending:
            for future in pending:
                future.cancel()
            pending.clear()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _main_module() -> list[str]:
    """The program, if it was started with -m: workers import it, so the fork server should do that once for all."""
    spec = sys.modules["__main__"].__spec__
    return [] if spec is None or spec.name.endswith("__main__") else [spec.name]


def _worker_died() -> DataError:
    return DataError(
        "a data worker process died, most likely killed for lack of host memory; "
        "lower data.num_workers or data.prefetch_factor."
    )
