"""Which samples make the packs of each step, and which replica gets which pack; the same on every replica.

Integers only: nothing is read here. Reading and handing out is `reader.py`'s business.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megabagel.config.datasets import GroupConfig
from megabagel.config.schema import DataConfig
from megabagel.data.faults import DataError, Fault, FaultLog
from megabagel.data.mixture import Mixture
from megabagel.data.stream import Measured, Stream
from megabagel.packing.balance import balance, fill_limit
from megabagel.packing.binpack import BinPacker, PackLimits

Packs = list[list[Measured]]


class EndOfData(Exception):
    """All groups have been repeated as often as they may be."""


@dataclass
class PlannedStep:
    """What one step is made of. Without packs, `stop` says why there is no step."""

    packs: list[Packs]  # of each replica; a pack may be empty
    draws: list[tuple[int, Fault | None]]  # group and fault of every sample drawn for it, in order
    state: dict  # of the planner, after it
    stop: DataError | EndOfData | None = None
    num_bytes: list[int] = field(init=False)  # of pixels, of each replica

    def __post_init__(self) -> None:
        self.num_bytes = [sum(sample.num_bytes for pack in packs for sample in pack) for packs in self.packs]


class _GivenUp(Exception):
    """Too many rows of a group are bad."""


class StepPlanner:
    """Plans one step after the other. Its state after a step is a few integers and the samples that wait."""

    def __init__(
        self,
        config: DataConfig,
        groups: Mapping[str, GroupConfig],
        stream: Stream,
        judge: FaultLog,
        global_batch_size: int,
        num_replicas: int,
        max_packs: int | None = None,
    ) -> None:
        """`judge` is told every draw and stops the planning of more when too many are bad. `max_packs`: the data end
        after so many packs from the start or the last `load_state`. Raises DataError when the groups cannot be drawn
        from, ValueError when token budgets or batch sizes contradict each other."""
        if global_batch_size % num_replicas:
            raise ValueError(
                f"training.global_batch_size is {global_batch_size}, but must be a multiple of the {num_replicas} "
                "data-parallel replicas"
            )
        self._is_balanced = config.packing == "balanced"
        self._max_num_tokens = config.max_num_tokens
        fill = config.max_num_tokens
        if self._is_balanced:
            fill = fill_limit(config.max_num_tokens, config.max_num_tokens_per_sample)
        limits = PackLimits(
            min(config.expected_num_tokens, fill),
            fill,
            config.max_num_tokens_per_sample,
            config.prefer_buffer_before,
            config.max_buffer_size,
        )
        self._names = list(groups)
        self._stream, self._judge = stream, judge
        self._global_batch_size, self._num_replicas = global_batch_size, num_replicas
        self._max_packs, self._num_packs = max_packs, 0
        self._mixture = Mixture({name: group.weight for name, group in groups.items()}, config.seed)
        self._mandatory = [i for i, group in enumerate(groups.values()) if group.is_mandatory]
        strategy = "greedy" if config.packing == "greedy" else "best_fit"
        self._packer = BinPacker(limits, self._mandatory, self._choose_group, self._fetch, strategy)
        self._draws: list[tuple[int, Fault | None]] = []

    def next_step(self) -> PlannedStep:
        """The next step. At the end of the data its last packs may be empty, then there are no more steps."""
        packs, stop = [], None
        try:
            while len(packs) < self._global_batch_size and (pack := self._next_pack()):
                packs.append(pack)
        except _GivenUp as error:
            packs, stop = [], error.__cause__
        draws, self._draws = self._draws, []
        if not packs:
            return PlannedStep([], draws, self.state(), stop or EndOfData("every group was read as often as it may be"))
        if self._is_balanced:
            packs = self._balance(packs)
        packs += [[] for _ in range(self._global_batch_size - len(packs))]
        return PlannedStep(deal(packs, self._num_replicas, self._is_balanced), draws, self.state())

    def state(self) -> dict:
        """Integers and lists of them."""
        return {
            "counts": list(self._stream.counts),
            "num_draws": self._packer.num_draws,
            "waiting": [[sample.group_index, sample.position] for sample in self._packer.buffer],
        }

    def load_state(self, state: dict) -> list[tuple[int, Fault]]:
        """Continue from `state`; group and fault of samples that waited then and cannot be used any more."""
        self._stream.seek(state["counts"])
        self._packer.num_draws = state["num_draws"]
        self._draws, self._num_packs = [], 0
        waiting = self._stream.measure([tuple(reference) for reference in state["waiting"]])
        self._packer.open, self._packer.num_mandatory_done = [], 0
        self._packer.buffer = [sample for sample in waiting if isinstance(sample, Measured)]
        lost = zip(state["waiting"], waiting, strict=True)
        return [(group, sample) for (group, _), sample in lost if isinstance(sample, Fault)]

    def _next_pack(self) -> list[Measured] | None:
        """None at the end of the data."""
        if self._num_packs == self._max_packs:
            return None
        self._num_packs += 1
        return self._packer.next_pack()

    def _choose_group(self, draw: int) -> int | None:
        return self._mixture.group(draw, self._stream.ended())

    def _fetch(self, group: int) -> Measured | None:
        """The group's next usable sample; None when it has no more."""
        name = self._names[group]
        while (sample := self._stream.next(group)) is not None:
            if isinstance(sample, Measured):
                self._draws.append((group, None))
                self._judge.good(name)
                return sample
            self._draws.append((group, sample))
            try:
                self._judge.bad(name, sample)
            except DataError as error:
                raise _GivenUp from error
        return None

    def _balance(self, packs: Packs) -> Packs:
        samples = [sample for pack in packs for sample in pack]
        numbers, indices = iter(range(len(samples))), []
        for pack in packs:
            indices.append([next(numbers) for _ in pack])
        balanced = balance(
            indices,
            [sample.num_tokens for sample in samples],
            [sample.cost for sample in samples],
            [sample.group_index for sample in samples],
            self._mandatory,
            self._max_num_tokens,
        )
        return [[samples[i] for i in pack] for pack in balanced]


def deal(packs: Packs, num_replicas: int, by_cost: bool = False) -> list[Packs]:
    """The packs of each replica: in turn, or the dearest first and every other round backwards."""
    if not by_cost:
        return [packs[replica::num_replicas] for replica in range(num_replicas)]
    ordered = sorted(packs, key=lambda pack: -sum(sample.cost for sample in pack))  # stable
    rounds: Sequence[Packs] = [ordered[i : i + num_replicas] for i in range(0, len(ordered), num_replicas)]
    turned = [packs[::-1] if i % 2 else packs for i, packs in enumerate(rounds)]
    return [list(packs) for packs in zip(*turned, strict=True)]
