"""Runs independent units of work in this process or in several, each with files of its own opened once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from megabagel.checkpoint.errors import CheckpointError

_do: Callable[[object], object]  # of this worker process


def side_by_side(
    make: Callable[[], Callable[[object], object]], units: Sequence[object], processes: int
) -> Iterator[tuple[object, object]]:
    """(unit, result) as they are finished. `make` is called once per process and gives what does a unit.

    `make`, units and results must be picklable for more than one process. Raises CheckpointError when a process was
    killed.
    """
    if processes == 1 or len(units) < 2:
        do = make()
        for unit in units:
            yield unit, do(unit)
        return
    with ProcessPoolExecutor(min(processes, len(units)), get_context("spawn"), _start, (make,)) as pool:
        pending = {pool.submit(_work, unit): unit for unit in units}
        try:
            for future in as_completed(pending):
                yield pending[future], future.result()
        except BrokenProcessPool:
            raise CheckpointError(
                "one of the processes was killed, perhaps for want of memory; start again with fewer --processes: what "
                "is finished stays"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(make: Callable[[], Callable[[object], object]]) -> None:
    global _do
    torch.set_num_threads(1)
    _do = make()


def _work(unit: object) -> object:
    return _do(unit)
