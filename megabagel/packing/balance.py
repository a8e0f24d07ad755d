"""Equal work in all packs of a step: samples are exchanged between its packs until the heaviest is hardly above the
mean. It sees token counts, costs and groups only; which samples make a step is `binpack.py`'s business.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np

TOLERANCE = 0.001  # a pack whose cost is this little above the mean is not worth an exchange
_FILL = 0.995  # of the token budget, so that samples of other lengths can be exchanged
_CANDIDATES = 12  # samples of a pack of which any one or two may be exchanged
_CUTS = 16  # places between which a run of a pack's samples, in order of cost per token, may be exchanged
_WORTHWHILE = 0.05  # of the heaviest pack's excess: what an exchange has to take away
_PARTNERS = 4  # packs of which the best exchange is taken, lightest first
_MORE_PARTNERS = 32  # packs that are tried when none of those has one
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
    `max_num_tokens`, and each keeps a sample of every group of `mandatory` that it had. The heaviest pack gives one or
    two samples, or a run of its small ones, to a light pack and takes such a choice for them, again and again; the
    largest cost never grows. The result depends on the arguments only.
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
    """The partner, and the samples that go to it and come back: the best of the first partners, lightest first, or else
    the first of more that takes a worthwhile part of the excess away; None when there is none."""
    best = loads[heavy] - _WORTHWHILE * (loads[heavy] - enough)
    found = None
    for tried, light in enumerate(np.argsort(loads, kind="stable")[:_MORE_PARTNERS].tolist()):
        if best <= enough or (tried >= _PARTNERS and found is not None) or loads[light] >= best:
            break
        heavier, given, taken = packs[heavy].exchange_with(packs[light], max_num_tokens)
        if heavier < best:
            best, found = heavier, (light, given, taken)
    return found


class _Pack:
    """Samples of one pack, and what those weigh together that an exchange may choose."""

    def __init__(self, samples: list[int], table: np.ndarray, required: np.ndarray):
        self._table, self._required = table, required
        self._set(samples)

    def _set(self, samples: list[int]) -> None:
        self.samples = samples
        columns = np.array(samples, dtype=np.int64)
        self.tokens, self.cost = self._table[:, columns].sum(axis=1).tolist()
        self._present = self._required[:, columns].sum(axis=1)  # samples of each mandatory group
        self._choices: np.ndarray | None = None  # what an exchange chooses from; None: not asked for yet

    def _weigh(self) -> None:
        """Tokens, cost and mandatory samples of every choice that may be exchanged, by tokens."""
        if self._choices is not None:
            return
        tokens, costs = self._table[:, self.samples]
        self._order = np.argsort(costs / tokens, kind="stable")
        self._choices = _choices(len(self.samples))
        each = np.concatenate([self._table, self._required])[:, [self.samples[i] for i in self._order]]
        sums = each @ self._choices.T
        by_tokens = np.argsort(sums[0], kind="stable")
        self._choices = self._choices[by_tokens]
        self._of_tokens, self._of_costs, self._of_present = sums[0, by_tokens], sums[1, by_tokens], sums[2:, by_tokens]

    def _chosen(self, number: int) -> list[int]:
        """Samples of a choice."""
        return [self.samples[i] for i in self._order[self._choices[number]].tolist()]

    def exchange_with(self, other: "_Pack", max_num_tokens: int) -> tuple[int, list[int], list[int]]:
        """The larger cost of the two after the best exchange, the samples given and those taken."""
        self._weigh()
        other._weigh()
        # what comes for a choice may be so much longer, or so much shorter, that both packs stay within the budget
        first = np.searchsorted(other._of_tokens, self._of_tokens - (max_num_tokens - other.tokens), "left")
        last = np.searchsorted(other._of_tokens, self._of_tokens + (max_num_tokens - self.tokens), "right")
        number = last - first
        given = np.repeat(np.arange(len(number)), number)
        taken = np.arange(len(given)) - np.repeat(number.cumsum() - number - first, number)
        costs = self._of_costs[given] - other._of_costs[taken]
        heavier = np.maximum(self.cost - costs, other.cost + costs)
        for group in range(len(self._present)):
            leaving = self._of_present[group, given] - other._of_present[group, taken]
            stays = (leaving < self._present[group]) | (self._present[group] == 0)
            stays &= (-leaving < other._present[group]) | (other._present[group] == 0)
            heavier[~stays] = np.iinfo(np.int64).max
        best = int(heavier.argmin())
        return int(heavier[best]), self._chosen(given[best]), other._chosen(taken[best])

    def swap(self, given: list[int], other: "_Pack", taken: list[int]) -> None:
        self._set([sample for sample in self.samples if sample not in given] + taken)
        other._set([sample for sample in other.samples if sample not in taken] + given)


@lru_cache(maxsize=1024)
def _choices(number: int) -> np.ndarray:
    """What may leave a pack of so many samples, which are in order of their costs per token: bool [choices, samples].

    None, one or two of _CANDIDATES samples that are spread over the order, and runs of neighbours in it.
    """
    candidates = np.unique(np.linspace(0, number - 1, min(number, _CANDIDATES)).round().astype(np.int64)).tolist()
    cuts = np.unique(np.linspace(0, number, min(number, _CUTS) + 1).round().astype(np.int64)).tolist()
    chosen = [subset for size in range(3) for subset in combinations(candidates, size)]
    chosen += [tuple(range(first, last)) for first, last in combinations(cuts, 2)]
    table = np.zeros((len(chosen), number), dtype=bool)
    for row, columns in enumerate(dict.fromkeys(chosen)):
        table[row, list(columns)] = True
    return table[: row + 1]
