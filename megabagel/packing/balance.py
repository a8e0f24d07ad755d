"""Equal work in all packs of a step: samples are exchanged between its packs until the heaviest is hardly above the
mean. It sees token counts, costs and groups only; which samples make a step is `binpack.py`'s business.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

TOLERANCE = 0.001  # a pack whose cost is this little above the mean is not worth an exchange
_FILL = 0.995  # of the token budget, so that samples of other lengths can be exchanged
_CANDIDATES = 16  # samples of a pack that an exchange chooses from
_PARTNERS = 8  # packs that the heaviest one tries, lightest first
_EXCHANGES_PER_PACK = 8  # bound of the search


def fill_limit(max_num_tokens: int, max_num_tokens_per_sample: int) -> int:
    """Tokens up to which the packs of a step are filled before they are balanced: full ones have nothing to exchange
    but samples of the same length. At least a whole sample fits."""
    return max(int(max_num_tokens * _FILL), max_num_tokens_per_sample)


def balance(
    packs: Sequence[Sequence[int]],
    tokens: Sequence[int],
    costs: Sequence[int],
    groups: Sequence[int],
    mandatory: Sequence[int],
    max_num_tokens: int,
) -> list[list[int]]:
    """The same samples in as many packs, with the largest cost of a pack as close to the mean as exchanges bring it.

    `packs`: samples as indices into `tokens`, `costs` (any unit, below 2^53 for a pack) and `groups`. No pack passes
    `max_num_tokens`, and each keeps a sample of every group of `mandatory` that it had. The heaviest pack gives up to
    two samples to one of the lightest and takes up to two for them, again and again; the largest cost never grows. The
    result depends on the arguments only.
    """
    table = np.array([tokens, costs], dtype=np.int64).reshape(2, -1)
    of_group = np.array(groups, dtype=np.int64)
    required = (of_group[None] == np.array(mandatory, dtype=np.int64)[:, None]).astype(np.int64)  # [mandatory, samples]
    open_packs = [_Pack(list(pack), table, required) for pack in packs]
    loads = np.array([pack.cost for pack in open_packs], dtype=np.int64)
    enough = loads.sum() / max(len(loads), 1) * (1 + TOLERANCE)
    for _ in range(_EXCHANGES_PER_PACK * len(open_packs)):
        heavy = int(loads.argmax())
        if loads[heavy] <= enough:
            break
        found = _best_exchange(open_packs, loads, heavy, max_num_tokens, enough)
        if found is None:
            break
        light, given, taken = found
        open_packs[heavy].swap(given, open_packs[light], taken)
        loads[heavy], loads[light] = open_packs[heavy].cost, open_packs[light].cost
    return [pack.samples for pack in open_packs]


def _best_exchange(
    packs: list["_Pack"], loads: np.ndarray, heavy: int, max_num_tokens: int, enough: float
) -> tuple[int, list[int], list[int]] | None:
    """The partner, and the samples that go to it and come back: the first exchange after which neither is above
    `enough`, else the best of all partners; None when nothing makes the heavier of the two lighter."""
    best, found = loads[heavy], None
    for light in np.argsort(loads, kind="stable")[:_PARTNERS].tolist():
        if light == heavy:
            continue
        heavier, given, taken = packs[heavy].exchange_with(packs[light], max_num_tokens)
        if heavier < best:
            best, found = heavier, (light, given, taken)
        if best <= enough:
            break
    return found


class _Pack:
    """Samples of one pack, and what any one or two of them weigh together."""

    def __init__(self, samples: list[int], table: np.ndarray, required: np.ndarray):
        self._table, self._required = table, required
        self._set(samples)

    def _set(self, samples: list[int]) -> None:
        self.samples = samples
        columns = np.array(samples, dtype=np.int64)
        self.tokens, self.cost = self._table[:, columns].sum(axis=1).tolist()
        self._present = self._required[:, columns].sum(axis=1)  # samples of each mandatory group
        self._subsets: list[list[int]] | None = None

    def _weigh(self) -> None:
        """Tokens, cost and mandatory samples of every subset that may be exchanged: the empty one comes first."""
        if self._subsets is not None:
            return
        candidates = _spread(self.samples, self._table)
        first, second = _pairs(len(candidates))
        columns = np.array([*candidates, -1], dtype=np.int64)
        both = np.concatenate([self._table, self._required])[:, columns]
        both[:, -1] = 0
        sums = both[:, first] + both[:, second]
        self._subset_tokens, self._subset_costs, self._subset_present = sums[0], sums[1], sums[2:]
        self._subsets = [
            [candidates[i] for i in (a, b) if i < len(candidates)]
            for a, b in zip(first.tolist(), second.tolist(), strict=True)
        ]

    def exchange_with(self, other: "_Pack", max_num_tokens: int) -> tuple[int, list[int], list[int]]:
        """The larger cost of the two after the best exchange, the samples given and those taken."""
        self._weigh()
        other._weigh()
        tokens = self._subset_tokens[:, None] - other._subset_tokens[None]
        costs = self._subset_costs[:, None] - other._subset_costs[None]
        heavier = np.maximum(self.cost - costs, other.cost + costs)
        legal = (self.tokens - tokens <= max_num_tokens) & (other.tokens + tokens <= max_num_tokens)
        for group in range(len(self._present)):
            leaving = self._subset_present[group][:, None] - other._subset_present[group][None]
            if self._present[group]:
                legal &= leaving < self._present[group]
            if other._present[group]:
                legal &= -leaving < other._present[group]
        heavier[~legal] = np.iinfo(np.int64).max
        best = int(heavier.argmin())
        row, column = divmod(best, heavier.shape[1])
        return int(heavier[row, column]), self._subsets[row], other._subsets[column]

    def swap(self, given: list[int], other: "_Pack", taken: list[int]) -> None:
        self._set([sample for sample in self.samples if sample not in given] + taken)
        other._set([sample for sample in other.samples if sample not in taken] + given)


def _spread(samples: list[int], table: np.ndarray) -> list[int]:
    """At most _CANDIDATES of the samples, evenly over the order of their costs per token."""
    if len(samples) <= _CANDIDATES:
        return samples
    tokens, costs = table[:, samples]
    order = np.argsort(costs / tokens, kind="stable")
    chosen = order[np.linspace(0, len(samples) - 1, _CANDIDATES).round().astype(np.int64)]
    return [samples[i] for i in chosen.tolist()]


@lru_cache(maxsize=_CANDIDATES + 1)
def _pairs(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Every choice of none, one or two of so many things, none first; `number` stands for no thing."""
    singles = np.arange(number)
    first, second = np.triu_indices(number, 1)
    none = np.full(number + 1, number)
    return np.concatenate([[number], singles, first]), np.concatenate([none, second])
