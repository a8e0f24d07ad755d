"""Seconds that work takes on a GPU, between two events of its stream."""

from collections.abc import Callable
from statistics import median

import torch


def seconds_of(work: Callable[[], object], repeats: int = 7, calls: int = 10) -> float:
    """Median over `repeats` of the mean of `calls` calls in a row, which hides the time to launch them."""
    work()
    taken = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / calls)
    return median(taken)
