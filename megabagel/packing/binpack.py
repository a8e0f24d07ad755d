"""Greedy packing: which samples share a sequence, in the order and with the limits of BAGEL, losing none.

It sees token counts only. What a sample holds, and how it is drawn, is behind `choose_group` and `fetch`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Entry(Protocol):
    """A sample that can be packed."""

    group_index: int
    num_tokens: int


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class PackLimits:
    """Token counts, padding excluded."""

    expected_num_tokens: int  # a pack is closed once it holds this many
    max_num_tokens: int  # and never holds more than this many
    max_num_tokens_per_sample: int
    prefer_buffer_before: int  # below this fill, waiting samples go first
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


class BinPacker(Generic[E]):
    """Builds packs one after the other. Between two entries all its state is in the four public fields.

    Each pack starts with one sample of every mandatory group, then takes groups as `choose_group(draw number)` says.
    A sample that would overflow the pack waits in the buffer; below `prefer_buffer_before` tokens the first waiting
    sample that fits goes before a new draw. An overflow beyond `max_buffer_size` closes the pack.
    """

    def __init__(
        self,
        limits: PackLimits,
        mandatory: list[int],
        choose_group: Callable[[int], int],
        fetch: Callable[[int], E],
    ) -> None:
        """`mandatory`: group indices. `fetch(group)` gives the group's next sample, at most
        `max_num_tokens_per_sample` tokens long."""
        self.limits = limits
        self.mandatory = mandatory
        self.choose_group = choose_group
        self.fetch = fetch
        self.open: list[E] = []  # the pack being filled
        self.buffer: list[E] = []  # waiting samples, oldest first
        self.num_mandatory_done = 0  # mandatory groups already served in the open pack
        self.num_draws = 0  # weighted draws so far

    def next_pack(self) -> list[E]:
        """The next closed pack, its samples in packing order."""
        limits = self.limits
        while True:
            while self.num_mandatory_done < len(self.mandatory):
                group = self.mandatory[self.num_mandatory_done]
                entry = self._take_waiting(lambda e, group=group: e.group_index == group) or self.fetch(group)
                self.num_mandatory_done += 1
                (self.open if self._fits(entry) else self.buffer).append(entry)
            fill = self._fill()
            if fill >= limits.expected_num_tokens:
                return self._close()
            overfull = len(self.buffer) > limits.max_buffer_size
            entry = self._take_waiting(self._fits) if overfull or fill < limits.prefer_buffer_before else None
            if entry is None and overfull and self.open:
                return self._close()
            if entry is None:
                entry = self.fetch(self.choose_group(self.num_draws))
                self.num_draws += 1
            if self._fits(entry):
                self.open.append(entry)
            else:
                self.buffer.append(entry)
                if len(self.buffer) > limits.max_buffer_size:
                    return self._close()

    def _fill(self) -> int:
        return sum(entry.num_tokens for entry in self.open)

    def _fits(self, entry: E) -> bool:
        return self._fill() + entry.num_tokens <= self.limits.max_num_tokens

    def _take_waiting(self, wanted: Callable[[E], bool]) -> E | None:
        """Remove and return the oldest waiting entry that is `wanted`."""
        for i, entry in enumerate(self.buffer):
            if wanted(entry):
                return self.buffer.pop(i)
        return None

    def _close(self) -> list[E]:
        pack, self.open, self.num_mandatory_done = self.open, [], 0
        return pack
