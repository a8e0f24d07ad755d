"""Spreads pieces of work of known cost over equal workers, and says how even the result is. Pure arithmetic."""

import heapq
from collections.abc import Sequence


def spread(costs: Sequence[float], workers: int) -> list[int]:
    """Worker of each piece: largest piece first, each to the least loaded worker (Graham 1969), ties to the first.

    The largest load is at most 4/3 - 1/(3 workers) times what the best of all assignments has.
    """
    heap, owners = [(0.0, worker) for worker in range(workers)], [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, owners[piece] = heap[0]
        heapq.heapreplace(heap, (load + costs[piece], owners[piece]))
    return owners


def imbalance(costs: Sequence[float], owners: Sequence[int], workers: int) -> float | None:
    """Largest load over mean load: 1 is even, `workers` means that one does everything; None when there is no work."""
    loads = [0.0] * workers
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return max(loads) * workers / sum(loads) if sum(loads) else None
