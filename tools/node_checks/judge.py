"""From what all ranks found to sentences: `faults`, with which a run must not start, and `warnings`. Pure functions."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from statistics import median

SLOW = 0.7  # of the median: below it a rank is named
PRODUCT_TOLERANCE = 1e-3  # relative; processors of different makers round differently
LISTED = 8  # ranks or nodes in one sentence


def listed(names: Iterable[object]) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(str, names[:LISTED])) + more


def by_node(faults: Mapping[str, Iterable[str]]) -> list[str]:
    """Each sentence once, after the nodes that said it."""
    nodes = defaultdict(list)
    for node, sentences in faults.items():
        for sentence in sentences:
            nodes[sentence].append(node)
    return [f"{listed(names)}: {sentence}" for sentence, names in nodes.items()]


def missing(ranks: list[int], node_of: Mapping[int, str], what: str, seconds: float) -> list[str]:
    """A sentence for each node with ranks that did not do `what` in time."""
    found = defaultdict(list)
    for rank in ranks:
        found[node_of.get(rank, "an unknown node")].append(rank)
    return [f"{node}: rank {listed(some)} did not {what} within {seconds:.0f} s." for node, some in found.items()]


def disagreement(values: Mapping[str, str], what: str) -> list[str]:
    """About the nodes whose value is not that of most nodes. `values`: by node."""
    if len(set(values.values())) < 2:
        return []
    usual, count = Counter(values.values()).most_common(1)[0]
    sentences = []
    for node, value in values.items():
        if value != usual:
            others = f"{count} of {len(values)} nodes"
            sentences.append(f"{node} has other {what} than {others}: {value} instead of {usual}.")
    return sentences


def wrong_sums(results: Mapping[int, Mapping[str, float]], node_of: Mapping[int, str]) -> list[str]:
    bad = [rank for rank, result in results.items() if result["wrong"]]
    if len(bad) > 1 and len(bad) == len(results):
        return [f"the all-reduce gave a wrong sum on all {len(bad)} ranks: one of them, or the network, is damaged."]
    return [f"{node_of[rank]}: rank {rank} got a wrong sum in an all-reduce." for rank in bad]


def wrong_products(results: Mapping[int, Mapping[str, float]], node_of: Mapping[int, str]) -> list[str]:
    products = [result["product"] for result in results.values()]
    usual = median([product for product in products if math.isfinite(product)] or [0.0])
    sentences = []
    for rank, result in results.items():
        product = result["product"]
        if not abs(product - usual) <= PRODUCT_TOLERANCE * abs(usual):  # a NaN is wrong too
            sentences.append(f"{node_of[rank]}: rank {rank} computes wrongly: {product:g} where others get {usual:g}.")
    return sentences


def slow(
    results: Mapping[int, Mapping[str, float]], node_of: Mapping[int, str], key: str, what: str, unit: str
) -> list[str]:
    """About ranks far below the median of at least three."""
    values = {rank: result[key] for rank, result in results.items()}
    if len(values) < 3:
        return []
    usual = median(values.values())
    return [
        f"{node_of[rank]}: rank {rank} is slow: {what} {value:.3g} {unit}, the median is {usual:.3g}."
        for rank, value in values.items()
        if value < SLOW * usual
    ]
