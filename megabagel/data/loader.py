"""From a position in a group's order to a sample: measured, or with its pixels.

Every random choice is keyed by the sample, so where and when it is made changes nothing. Worker processes are in
`workers.py`, packing is elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megabagel.config.datasets import GroupConfig
from megabagel.data.faults import DataFault, Fault
from megabagel.data.order import GroupOrder
from megabagel.data.prepare import Preparer
from megabagel.data.sources import open_source
from megabagel.packing.splits import PlannedSample


@dataclass
class SampleMaker:
    """Makes samples of all groups in the calling process. Raises DataError when a group cannot be read at all."""

    groups: dict[str, GroupConfig]
    preparer: Preparer
    seed: int

    def __post_init__(self) -> None:
        self.sources = [open_source(name, group, self.seed) for name, group in self.groups.items()]
        self.orders = [GroupOrder(s.blocks, self.seed, i, s.window) for i, s in enumerate(self.sources)]

    def origin(self, group_index: int, position: int) -> str:
        """File and row of what is at `position` of a group's order."""
        return self.sources[group_index].origin(self.orders[group_index].row(position)[1])

    def measure(self, group_index: int, position: int) -> PlannedSample | Fault:
        """The sample at `position` of a group's order without its pixels, or why it cannot be used."""
        return self._attempt(group_index, position, lambda row, key: self._measure(group_index, row, key))

    def load(self, group_index: int, position: int, planned: PlannedSample | None = None) -> PlannedSample | Fault:
        """The same with its pixels. `planned`: what `measure` gave, where it is at hand."""

        def read(row: int, key: tuple[int, ...]) -> PlannedSample:
            entries = self.sources[group_index].document(row, key)
            sample = planned or self._prepare(group_index, row, key, entries)
            return self.preparer.read(sample, group_index, entries)

        return self._attempt(group_index, position, read)

    def _measure(self, group_index: int, row: int, key: tuple[int, ...]) -> PlannedSample:
        return self._prepare(group_index, row, key, self.sources[group_index].document(row, key))

    def _prepare(self, group_index: int, row: int, key: tuple[int, ...], entries: list) -> PlannedSample:
        return self.preparer.measure(group_index, entries, key, self.sources[group_index].origin(row))

    def _attempt(
        self, group_index: int, position: int, make: Callable[[int, tuple[int, ...]], PlannedSample]
    ) -> PlannedSample | Fault:
        visit, row = self.orders[group_index].row(position)
        key = (group_index, row, visit)
        origin = self.sources[group_index].origin(row)
        try:
            return make(row, key)
        except DataFault as fault:
            return Fault(fault.kind, origin, str(fault), key)
        except MemoryError:
            raise
        except Exception as error:  # a row of an unforeseen shape must not end a run of weeks
            message = str(error).removeprefix(f"{origin}: ")
            return Fault("bad_row", origin, message if isinstance(error, ValueError) else f"{error!r}", key)
