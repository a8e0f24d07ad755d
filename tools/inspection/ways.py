"""How well each way of packing would do with the measured samples: fill of the packs, and work of the ranks of a step.

A simulation on token counts and costs. The samples come in the order of the mixture's draws, each group again from its
first one when it is through.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megabagel.packing.balance import balance, fill_limit
from megabagel.packing.binpack import PackLimits, pack_sequence

RANKS = 8
WAYS = {"greedy": "greedy, official order", "best_fit": "best fit", "balanced": "balanced"}


@dataclass(frozen=True)
class Way:
    """What a way of packing comes to. `imbalance`: work of the heaviest pack over the mean of a step of RANKS packs,
    mean over all steps, and `worst` of them; None where there are not enough packs for one step."""

    strategy: str
    packs: int
    samples: float  # per pack
    fill: float  # tokens over what the packs could hold
    imbalance: float | None
    worst: float | None


@dataclass(frozen=True)
class Draws:
    """A sequence of samples as the packer meets them."""

    tokens: list[int]
    costs: list[int]
    groups: list[int]


def draw(groups: Sequence[int], tokens: Sequence[Sequence[int]], costs: Sequence[Sequence[int]]) -> Draws:
    """The samples of the drawn `groups`, each from `tokens[group]` and `costs[group]` in turn. A group without a usable
    sample is passed over."""
    taken = [0] * len(tokens)
    drawn = Draws([], [], [])
    for group in groups:
        if not len(tokens[group]):
            continue
        place = taken[group] % len(tokens[group])
        taken[group] += 1
        drawn.tokens.append(int(tokens[group][place]))
        drawn.costs.append(int(costs[group][place]))
        drawn.groups.append(group)
    return drawn


def pack(strategy: str, limits: PackLimits, drawn: Draws, mandatory: Sequence[int]) -> list[list[int]]:
    """Indices of the samples of each pack. The last pack, which no more draws fill, is left out where there are others.

    Raises RuntimeError where the C++ planner is not compiled."""
    if strategy == "balanced":
        room = fill_limit(limits.max_num_tokens, limits.max_num_tokens_per_sample)
        limits = replace(limits, max_num_tokens=room, expected_num_tokens=min(limits.expected_num_tokens, room))
    order = "greedy" if strategy == "greedy" else "best_fit"
    pack_of = pack_sequence(order, limits, drawn.tokens, drawn.groups, list(mandatory))
    packs: list[list[int]] = [[] for _ in range(max(pack_of, default=-1) + 1)]
    for sample, number in enumerate(pack_of):
        packs[number].append(sample)
    return packs[:-1] if len(packs) > 1 else packs


def try_way(strategy: str, limits: PackLimits, drawn: Draws, mandatory: Sequence[int]) -> Way:
    packs = pack(strategy, limits, drawn, mandatory)
    ratios = []
    for first in range(0, len(packs) - RANKS + 1, RANKS):
        step = packs[first : first + RANKS]
        if strategy == "balanced":
            step = balance(step, drawn.tokens, drawn.costs, drawn.groups, list(mandatory), limits.max_num_tokens)
        work = np.array([sum(drawn.costs[sample] for sample in samples) for samples in step], dtype=np.float64)
        ratios.append(float(work.max() / work.mean()))
    tokens = sum(drawn.tokens[sample] for samples in packs for sample in samples)
    return Way(
        strategy,
        len(packs),
        sum(map(len, packs)) / max(len(packs), 1),
        tokens / max(len(packs) * limits.max_num_tokens, 1),
        float(np.mean(ratios)) if ratios else None,
        max(ratios, default=None),
    )
