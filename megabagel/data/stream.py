"""The samples of all groups in order, as every data-parallel replica sees them: what they weigh, not what they hold.

The replicas share the work of measuring a block of a group's positions and tell each other. Which group is drawn and
what a pack is made of is decided elsewhere.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from megabagel.data.faults import Fault
from megabagel.packing.splits import PlannedSample

BLOCK = 32  # positions of a group that one replica measures at a time; one more block is measured ahead

Exchange = Callable[[list], list[list]]  # gathers a picklable list of every replica, in the order of their ranks


@dataclass(frozen=True)
class Measured:
    """A sample that can be used, at `position` of its group's order."""

    group_index: int
    position: int
    num_tokens: int
    cost: int
    num_bytes: int  # of its pixels


class Stream:
    """Walks through the orders of all groups. All replicas make the same calls in the same order."""

    def __init__(
        self,
        measure: Callable[[int, int], Future],
        weigh: Callable[[PlannedSample], tuple[int, int, int]],
        lengths: Sequence[int | None],
        rank: int = 0,
        size: int = 1,
        exchange: Exchange | None = None,
    ) -> None:
        """`measure(group, position)` begins to measure: a PlannedSample or Fault. `weigh`: its tokens, cost and bytes.
        `lengths`: positions of each group; None: endless. `rank`, `size`: this replica and how many there are."""
        self._measure, self._weigh, self._lengths = measure, weigh, list(lengths)
        self._rank, self._size, self._exchange = rank, size, exchange
        self._positions = BLOCK * size  # of a block
        self.counts: list[int] = []  # positions of each group that were handed out, bad ones included
        self.seek([0] * len(self._lengths))

    def seek(self, counts: Sequence[int]) -> None:
        """Continue as if `counts[g]` positions of group g had been handed out."""
        self.counts = list(counts)
        self._blocks: list[tuple[int, list[Measured | Fault]]] = [(-1, []) for _ in counts]  # number, results
        self._ahead: list[tuple[int, list[Future]]] = [(-1, []) for _ in counts]
        self._samples: dict[tuple[int, int], PlannedSample] = {}

    def next(self, group: int) -> Measured | Fault | None:
        """What is at the group's next position; None at its end."""
        position = self.counts[group]
        if position == self._lengths[group]:
            return None
        block, place = divmod(position, self._positions)
        if self._blocks[group][0] != block:
            self._blocks[group] = block, self._gather_block(group, block)
        self.counts[group] = position + 1
        return self._blocks[group][1][place]

    def ended(self) -> list[int]:
        """Groups of which all positions were handed out."""
        return [group for group, length in enumerate(self._lengths) if self.counts[group] == length]

    def take(self, sample: Measured) -> PlannedSample | None:
        """The plan of a sample that this replica has measured, once; None elsewhere."""
        return self._samples.pop((sample.group_index, sample.position), None)

    def measure(self, references: Sequence[tuple[int, int]]) -> list[Measured | Fault]:
        """What is at these (group, position), again; for resume."""
        mine = list(references)[self._rank :: self._size]
        return self._share(mine, [self._measure(*reference) for reference in mine], len(references))

    def _gather_block(self, group: int, block: int) -> list[Measured | Fault]:
        number, futures = self._ahead[group]
        positions = self._block(group, block)
        if number != block:
            futures = self._begin(group, block)
        self._ahead[group] = block + 1, self._begin(group, block + 1)
        return self._share([(group, p) for p in positions[self._rank :: self._size]], futures, len(positions))

    def _block(self, group: int, block: int) -> range:
        """Positions of a block; the last one may be short. The first is a multiple of the number of replicas."""
        start, length = block * self._positions, self._lengths[group]
        return range(start, start + self._positions if length is None else min(start + self._positions, length))

    def _begin(self, group: int, block: int) -> list[Future]:
        return [self._measure(group, p) for p in self._block(group, block)[self._rank :: self._size]]

    def _share(self, mine: list[tuple[int, int]], futures: list[Future], number: int) -> list[Measured | Fault]:
        """All `number` results: replica r of n has those at r, r + n, r + 2n, ..."""
        results = [self._note(*reference, future.result()) for reference, future in zip(mine, futures, strict=True)]
        everyone = [results] if self._exchange is None else self._exchange(results)
        return [everyone[i % self._size][i // self._size] for i in range(number)]

    def _note(self, group: int, position: int, sample: PlannedSample | Fault) -> Measured | Fault:
        """What the others hear of a sample; its plan stays here until it is taken."""
        if isinstance(sample, Fault):
            return sample
        if position >= self.counts[group]:
            self._samples[group, position] = sample
        return Measured(group, position, *self._weigh(sample))
