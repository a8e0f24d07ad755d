"""Packing: which samples share a sequence, with the limits of BAGEL, losing none.

It sees token counts only. What a sample holds, and how it is drawn, is behind `choose_group` and `fetch`. `greedy`
keeps BAGEL's order; `best_fit` keeps `max_buffer_size` samples waiting and fills packs from them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, Protocol, TypeVar

from megabagel.packing import native


class Entry(Protocol):
    """A sample that can be packed."""

    group_index: int
    num_tokens: int


E = TypeVar("E", bound=Entry)
Strategy = Literal["greedy", "best_fit"]
DRAW, CLOSE = -1, -2


@dataclass(frozen=True)
class PackLimits:
    """Token counts, padding excluded."""

    expected_num_tokens: int  # a greedy pack is closed once it holds this many
    max_num_tokens: int  # and no pack ever holds more than this many
    max_num_tokens_per_sample: int
    prefer_buffer_before: int  # greedy: below this fill, waiting samples go first
    max_buffer_size: int  # waiting samples

    def __post_init__(self) -> None:
        if not 0 < self.expected_num_tokens <= self.max_num_tokens:
            raise ValueError(
                f"data.expected_num_tokens is {self.expected_num_tokens}, but must lie in 1 .. data.max_num_tokens "
                f"({self.max_num_tokens})"
            )
        if not 0 < self.max_num_tokens_per_sample <= self.max_num_tokens:
            raise ValueError(
                f"data.max_num_tokens_per_sample is {self.max_num_tokens_per_sample}, but must lie in 1 .. "
                f"data.max_num_tokens ({self.max_num_tokens}): a pack must hold at least one sample"
            )


def decide_reference(strategy: Strategy, limits: PackLimits, fill: int, waiting: Sequence[int]) -> int:
    """What comes next into a pack of `fill` tokens: the index of a waiting sample, DRAW or CLOSE.

    `waiting`: token counts, oldest sample first. A best-fit pack begins with the oldest, so a sample waits for no more
    packs than there are samples before it. From then on it takes the oldest of those that fill it best together.
    """
    room = limits.max_num_tokens - fill
    if strategy == "best_fit":
        if len(waiting) < max(limits.max_buffer_size, 1):
            return DRAW
        return _of_best_subset(waiting, room) if fill else 0
    if fill >= limits.expected_num_tokens:
        return CLOSE
    overfull = len(waiting) > limits.max_buffer_size
    if overfull or fill < limits.prefer_buffer_before:
        for i, length in enumerate(waiting):
            if length <= room:
                return i
    return CLOSE if overfull and fill else DRAW


def _of_best_subset(waiting: Sequence[int], room: int) -> int:
    """Index of the oldest of the waiting samples whose token counts add up to most within `room`; CLOSE: none fits.

    Bit b of a number says that some of the samples have b tokens together: subset sums by dynamic programming.
    """
    within = (1 << room + 1) - 1
    of_rest = [1]  # of the samples from the youngest on, then turned round: of those behind a sample
    for length in reversed(waiting):
        of_rest.append(of_rest[-1] | of_rest[-1] << length & within)
    best = of_rest.pop().bit_length() - 1
    for i, (length, sums) in enumerate(zip(waiting, reversed(of_rest), strict=True)):
        if length <= best and sums >> best - length & 1:
            return i
    return CLOSE


def decide(strategy: Strategy, limits: PackLimits, fill: int, waiting: Sequence[int]) -> int:
    """`decide_reference`, in C++ where it is compiled."""
    if native.PLANNER is None:
        return decide_reference(strategy, limits, fill, waiting)
    return native.PLANNER.decide(strategy, _tuple(limits), fill, waiting)


def pack_sequence(
    strategy: Strategy,
    limits: PackLimits,
    lengths: Sequence[int],
    groups: Sequence[int] | None = None,
    mandatory: Sequence[int] = (),
) -> list[int]:
    """The pack number of each sample of a known sequence: token counts and group indices in the order of the draws.

    In C++ only: RuntimeError where it is not compiled. Raises ValueError when a sample does not fit into a pack.
    """
    if native.PLANNER is None:
        raise RuntimeError("packing a known sequence needs the C++ planner: build it with 'python csrc/build.py'")
    groups = [0] * len(lengths) if groups is None else groups
    return native.PLANNER.pack_sequence(strategy, _tuple(limits), lengths, groups, mandatory)


def efficiency(lengths: Sequence[int], pack_of: Sequence[int], max_num_tokens: int) -> float:
    """Tokens over what the packs could hold."""
    return sum(lengths) / (len(set(pack_of)) * max_num_tokens) if lengths else 1.0


def _tuple(limits: PackLimits) -> tuple[int, int, int, int]:
    return (
        limits.expected_num_tokens,
        limits.max_num_tokens,
        limits.prefer_buffer_before,
        limits.max_buffer_size,
    )


class BinPacker(Generic[E]):
    """Builds packs one after the other. Between two packs all its state is in `buffer` and `num_draws`.

    Greedy: each pack starts with one sample of every mandatory group, then takes groups as `choose_group(draw number)`
    says. A sample that would overflow the pack waits in the buffer; below `prefer_buffer_before` tokens the first
    waiting sample that fits goes before a new draw. An overflow beyond `max_buffer_size` closes the pack.

    Best fit: all draws wait, and a pack is made of waiting samples: the oldest, one of every mandatory group that is
    not in yet, then those that fill it best. No sample waits for more than `max_buffer_size` + the number of mandatory
    groups packs.
    """

    def __init__(
        self,
        limits: PackLimits,
        mandatory: list[int],
        choose_group: Callable[[int], int | None],
        fetch: Callable[[int], E | None],
        strategy: Strategy = "greedy",
    ) -> None:
        """`mandatory`: group indices. `choose_group(number of the draw)`: None when every group has ended.
        `fetch(group)` gives the group's next sample, at most `max_num_tokens_per_sample` tokens long, or None when it
        has no more."""
        self.limits = limits
        self.mandatory = mandatory
        self.choose_group = choose_group
        self.fetch = fetch
        self.strategy = strategy
        self.open: list[E] = []  # the pack being filled
        self.buffer: list[E] = []  # waiting samples, oldest first
        self.num_mandatory_done = 0  # mandatory groups already served in the open pack
        self.num_draws = 0  # weighted draws so far

    def next_pack(self) -> list[E]:
        """The next closed pack, its samples in packing order; empty once there are no more."""
        greedy = self.strategy == "greedy"
        while True:
            if self.num_mandatory_done < len(self.mandatory) and (greedy or self.open):
                self._serve_mandatory(self.mandatory[self.num_mandatory_done])
                continue
            waiting = [entry.num_tokens for entry in self.buffer]
            choice = decide(self.strategy, self.limits, self._fill(), waiting)
            if choice == CLOSE:
                return self._close()
            if choice != DRAW:
                self.open.append(self.buffer.pop(choice))
                continue
            group = self.choose_group(self.num_draws)
            if group is None:
                if not self._take_waiting():
                    return self._close()
                continue
            entry = self.fetch(group)
            self.num_draws += 1
            if entry is None:
                continue
            if greedy and self._fits(entry):
                self.open.append(entry)
                continue
            self.buffer.append(entry)
            if greedy and len(self.buffer) > self.limits.max_buffer_size:
                return self._close()

    def _take_waiting(self) -> bool:
        """Put the waiting sample into the open pack that fills it best; False when there is none."""
        waiting = [entry.num_tokens for entry in self.buffer]
        all_there = replace(self.limits, max_buffer_size=len(waiting))
        choice = decide("best_fit", all_there, self._fill(), waiting) if waiting else CLOSE
        if choice != CLOSE:
            self.open.append(self.buffer.pop(choice))
        return choice != CLOSE

    def _serve_mandatory(self, group: int) -> None:
        """Put a sample of the group into the open pack; where none fits, one waits."""
        waiting = [i for i, entry in enumerate(self.buffer) if entry.group_index == group]
        entry = None
        if self.strategy == "greedy":
            entry = self.buffer.pop(waiting[0]) if waiting else self.fetch(group)
        elif all(entry.group_index != group for entry in self.open):
            fitting = [i for i in waiting if self._fits(self.buffer[i])]
            if fitting:
                entry = self.buffer.pop(fitting[0])
            elif not waiting:
                entry = self.fetch(group)
        self.num_mandatory_done += 1
        if entry is not None:
            (self.open if self._fits(entry) else self.buffer).append(entry)

    def _fill(self) -> int:
        return sum(entry.num_tokens for entry in self.open)

    def _fits(self, entry: E) -> bool:
        return self._fill() + entry.num_tokens <= self.limits.max_num_tokens

    def _close(self) -> list[E]:
        pack, self.open, self.num_mandatory_done = self.open, [], 0
        return pack
