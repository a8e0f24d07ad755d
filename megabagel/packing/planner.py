"""Splits of several samples become one PackPlan: every index, label, weight and segment of a packed sequence.

In C++, or in Python where nothing is compiled. It never sees pixels and decides nothing: order and dropout are settled.
"""

from collections.abc import Sequence

from megabagel.packing import native, reference
from megabagel.packing.geometry import Geometry, SpecialTokens
from megabagel.packing.plan import PackPlan
from megabagel.packing.splits import PlannedSample

__all__ = ["Geometry", "PlannedSample", "SpecialTokens", "build_plan", "fixed_length"]


def fixed_length(max_num_tokens: int, tile: int) -> int:
    """Padded length of both streams together, a multiple of `tile`, that holds any pack of `max_num_tokens`."""
    return (max_num_tokens + 2 * tile) // tile * tile


def build_plan(
    samples: Sequence[PlannedSample], geometry: Geometry, tile: int, total_length: int | None = None
) -> PackPlan:
    """The plan of `samples`, packed in the given order.

    Each stream is padded to a multiple of `tile` with at least one padding row. With `total_length` (pipeline
    parallelism) the und stream takes all that the gen stream leaves, so both together always have that length.
    Raises ValueError when the samples do not fit into `total_length` or there is none.
    """
    planner = reference if native.PLANNER is None else native
    return planner.build_plan(samples, geometry, tile, total_length)
