"""Balanced packs: every sample stays, limits hold, nothing gets worse, and work ends up equal."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from megabagel.packing.balance import TOLERANCE, balance, fill_limit

MOST = 1000


def loads(packs, values):
    return [sum(values[i] for i in pack) for pack in packs]


def groups_of(pack, groups, mandatory):
    return {groups[i] for i in pack} & set(mandatory)


@st.composite
def steps(draw):
    """Packs within the budget, whose samples have any costs and groups."""
    shapes = draw(st.lists(st.lists(st.integers(1, 300), max_size=25), min_size=1, max_size=8))
    packs, tokens = [], []
    for lengths in shapes:
        pack = []
        for length in lengths:
            if sum(tokens[i] for i in pack) + length <= MOST:
                pack.append(len(tokens))
                tokens.append(length)
        packs.append(pack)
    costs = draw(st.lists(st.integers(1, 10**14), min_size=len(tokens), max_size=len(tokens)))
    groups = draw(st.lists(st.integers(0, 3), min_size=len(tokens), max_size=len(tokens)))
    return packs, tokens, costs, groups


@settings(max_examples=100, deadline=None)
@given(steps(), st.sampled_from([[], [1], [0, 2]]))
def test_samples_and_limits_are_kept_and_no_pack_gets_heavier_than_the_heaviest(step, mandatory):
    packs, tokens, costs, groups = step
    before = [list(pack) for pack in packs]
    balanced = balance(packs, tokens, costs, groups, mandatory, MOST)
    assert packs == before
    assert sorted(i for pack in balanced for i in pack) == list(range(len(tokens)))
    assert max(loads(balanced, tokens)) <= MOST
    assert max(loads(balanced, costs)) <= max(loads(packs, costs))
    for old, new in zip(packs, balanced, strict=True):
        assert new or not old
        assert groups_of(old, groups, mandatory) <= groups_of(new, groups, mandatory)
    assert balance(packs, tokens, costs, groups, mandatory, MOST) == balanced


def many(num_packs, seed=0):
    """Packs nearly full of samples whose cost per token differs up to threefold."""
    draw = random.Random(seed)
    limit = fill_limit(36_864, 16_384)
    packs, tokens, costs = [], [], []
    for _ in range(num_packs):
        pack, dear = [], draw.choice((1.0, 1.2, 1.5))
        while True:
            length = draw.randint(200, 5000)
            if sum(tokens[i] for i in pack) + length > limit:
                break
            pack.append(len(tokens))
            tokens.append(length)
            costs.append(int(length * dear * draw.uniform(1, 2)))
        packs.append(pack)
    return packs, tokens, costs


def test_work_ends_up_equal_where_samples_can_be_exchanged():
    packs, tokens, costs = many(64)
    work = loads(balance(packs, tokens, costs, [0] * len(tokens), [], 36_864), costs)
    assert max(loads(packs, costs)) > 1.2 * sum(work) / 64
    assert max(work) <= (1 + TOLERANCE) * sum(work) / 64


def test_two_samples_are_exchanged_for_one_where_full_packs_allow_no_other():
    tokens, costs = [10, 5, 5, 10, 10, 10, 10], [61, 20, 25, 65, 30, 55, 58]
    balanced = balance([[0, 1, 2, 3], [4, 5, 6]], tokens, costs, [0] * 7, [], 30)
    assert sorted(map(sorted, balanced)) == [[0, 3, 4], [1, 2, 5, 6]]


def test_one_long_sample_is_exchanged_for_many_short_ones():
    tokens, costs = [400, 400] + [10] * 80, [1000, 1000] + [10] * 80
    balanced = balance([[0, 1], list(range(2, 82))], tokens, costs, [0] * 82, [], 800)
    assert loads(balanced, tokens) == [800, 800]
    assert loads(balanced, costs) == [1400, 1400]


def test_a_pack_that_needs_a_group_keeps_the_sample():
    packs, tokens, costs = [[0, 1], [2, 3]], [10] * 4, [50, 30, 10, 10]
    free = balance(packs, tokens, costs, [0, 1, 1, 1], [], 20)
    assert max(loads(free, costs)) == 60
    kept = balance(packs, tokens, costs, [0, 1, 2, 2], [0, 1], 20)
    assert kept == packs


def test_a_step_of_one_pack_or_of_none_stays():
    assert balance([[0, 1]], [1, 1], [1, 2], [0, 0], [0], 2) == [[0, 1]]
    assert balance([], [], [], [], [], 2) == []


def test_packs_are_filled_below_the_budget_but_hold_the_longest_sample():
    assert fill_limit(36_864, 16_384) == 36_679
    assert fill_limit(1000, 1000) == 1000
