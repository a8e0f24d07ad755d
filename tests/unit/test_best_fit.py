"""Best-fit packing: fuller packs, every sample in time, exact resume; decisions in C++ equal to those in Python."""

import random
from dataclasses import dataclass
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabagel.packing import native
from megabagel.packing.binpack import (
    CLOSE,
    BinPacker,
    PackLimits,
    decide,
    decide_reference,
    efficiency,
    pack_sequence,
)
from tests.unit.data_fixtures import edit_group, make_reader, t2i_group, vlm_group

compiled = pytest.mark.skipif(native.PLANNER is None, reason="the C++ planner is not built")


@dataclass
class Thing:
    group_index: int
    num_tokens: int
    number: int


class Stopped(Exception):
    """No sample is left."""


def endless_packer(seed, limits, mandatory, strategy="best_fit"):
    draw, fetched = random.Random(seed), []

    def fetch(group):
        fetched.append(Thing(group, draw.randint(1, limits.max_num_tokens_per_sample), len(fetched)))
        return fetched[-1]

    return BinPacker(limits, mandatory, lambda number: number % 3, fetch, strategy), fetched


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([[], [1], [0, 2]]), st.integers(0, 8), st.sampled_from([20, 40, 100]))
def test_every_sample_is_used_once_and_soon(seed, mandatory, buffer_size, longest):
    limits = PackLimits(80, 100, longest, 50, buffer_size)
    packer, fetched = endless_packer(seed, limits, mandatory)
    used, first_seen = [], {}
    for number in range(60):
        pack = packer.next_pack()
        assert 0 < sum(thing.num_tokens for thing in pack) <= 100
        if longest <= 100 // (len(mandatory) + 1):
            assert set(mandatory) <= {thing.group_index for thing in pack}
        used += [thing.number for thing in pack]
        for thing in [*pack, *packer.buffer]:
            first_seen.setdefault(thing.number, number)
        for thing in pack:
            assert number - first_seen[thing.number] <= max(buffer_size, 1) + len(mandatory)
        assert len(packer.buffer) <= max(buffer_size, 1) + len(mandatory)
    assert sorted([*used, *(thing.number for thing in packer.buffer)]) == list(range(len(fetched)))


def test_packs_are_fuller_than_greedy_ones():
    limits = PackLimits(890, 1000, 450, 450, 50)
    fill = {}
    for strategy in ("greedy", "best_fit"):
        packer, _ = endless_packer(1, limits, [], strategy)
        fill[strategy] = sum(thing.num_tokens for _ in range(300) for thing in packer.next_pack()) / 300_000
    assert fill["greedy"] < 0.96 and fill["best_fit"] > 0.999


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(1, 100))
def test_the_rest_of_a_pack_is_filled_as_well_as_waiting_samples_can(waiting, fill):
    limits = PackLimits(80, 100, 60, 50, len(waiting))
    sets = [c for n in range(1, len(waiting) + 1) for c in combinations(range(len(waiting)), n)]
    sums = {c: sum(waiting[i] for i in c) for c in sets}
    fitting = [c for c in sets if sums[c] <= 100 - fill]
    choice = decide_reference("best_fit", limits, fill, waiting)
    if not fitting:
        assert choice == CLOSE
        return
    most = max(sums[c] for c in fitting)
    assert choice == min(c[0] for c in fitting if sums[c] == most)


@compiled
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["greedy", "best_fit"]),
    st.lists(st.integers(1, 100), max_size=12),
    st.integers(0, 100),
    st.integers(1, 100),
    st.integers(0, 100),
    st.integers(0, 10),
)
def test_native_and_python_decide_the_same(strategy, waiting, fill, expected, prefer, buffer_size):
    limits = PackLimits(expected, 100, 100, prefer, buffer_size)
    assert decide(strategy, limits, fill, waiting) == decide_reference(strategy, limits, fill, waiting)


@compiled
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["greedy", "best_fit"]),
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2)), max_size=60),
    st.sampled_from([[], [1], [0, 2], [2, 1, 0]]),
    st.integers(0, 6),
)
def test_a_known_sequence_is_packed_as_the_packer_would(strategy, samples, mandatory, buffer_size):
    limits = PackLimits(80, 100, 60, 50, buffer_size)
    left = [Thing(group, length, i) for i, (length, group) in enumerate(samples)]
    next_group = []  # the group of the first sample that is left

    def fetch(group):
        found = next((thing for thing in left if thing.group_index == group), None)
        if found is None:
            raise Stopped
        left.remove(found)
        return found

    def choose_group(number):
        if not left:
            raise Stopped
        next_group.append(left[0].group_index)
        return left[0].group_index

    lengths, groups = [length for length, _ in samples], [group for _, group in samples]
    pack_of = pack_sequence(strategy, limits, lengths, groups, mandatory)
    assert len(pack_of) == len(samples)
    packer = BinPacker(limits, mandatory, choose_group, fetch, strategy)
    number = 0
    try:
        while True:
            assert {pack_of[thing.number] for thing in packer.next_pack()} == {number}
            number += 1
    except Stopped:  # the sequence goes on after this one ends, so only full packs compare
        pass
    for pack in set(pack_of):
        assert sum(length for length, p in zip(lengths, pack_of, strict=True) if p == pack) <= 100


@compiled
def test_efficiency_of_a_known_sequence():
    limits = PackLimits(80, 100, 60, 50, 3)
    lengths = [60, 60, 40, 40]
    assert pack_sequence("best_fit", limits, lengths) == [0, 1, 0, 1]
    assert efficiency(lengths, [0, 1, 0, 1], 100) == 1.0
    assert efficiency(lengths, [0, 1, 2, 3], 100) == 0.5
    assert pack_sequence("greedy", limits, []) == [] and efficiency([], [], 100) == 1.0
    with pytest.raises(ValueError, match=r"sample 1 has 101 tokens, but must have 1 .. 100"):
        pack_sequence("greedy", limits, [1, 101])
    with pytest.raises(ValueError, match="2 lengths come with 1 groups"):
        pack_sequence("greedy", limits, [1, 2], [0])
    with pytest.raises(ValueError, match=r"holds 101 tokens, but that must lie in 0 .. 100"):
        decide("best_fit", limits, 101, [1])
    with pytest.raises(ValueError, match="a waiting sample has 0 tokens"):
        decide("best_fit", limits, 1, [1, 0])
    with pytest.raises(ValueError, match="strategy is 'worst_fit', but must be 'greedy' or 'best_fit'"):
        pack_sequence("worst_fit", limits, [1])


def test_without_a_compiled_planner_decisions_stay_the_same(monkeypatch):
    limits = PackLimits(80, 100, 60, 50, 5)
    with_it, _ = endless_packer(4, limits, [1])
    packs = [[thing.number for thing in with_it.next_pack()] for _ in range(20)]
    monkeypatch.setattr(native, "PLANNER", None)
    without, _ = endless_packer(4, limits, [1])
    assert [[thing.number for thing in without.next_pack()] for _ in range(20)] == packs
    with pytest.raises(RuntimeError, match="needs the C\\+\\+ planner: build it with"):
        pack_sequence("greedy", limits, [1])


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {
        "t2i_pretrain": t2i_group(folder, weight=2.0),
        "unified_edit": edit_group(folder),
        "vlm_sft": vlm_group(folder, is_mandatory=True, weight=0.5),
    }


def test_the_reader_packs_fuller_and_every_pack_has_the_mandatory_group(groups):
    tokens = {}
    for packing in ("greedy", "best_fit"):
        with make_reader(groups, packing=packing, global_batch_size=12) as reader:
            packs = reader.next_step()
        assert all("vlm_sft" in pack.groups for pack in packs)
        tokens[packing] = sum(pack.plan.sequence_length for pack in packs)
    assert tokens["best_fit"] > tokens["greedy"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2)), max_size=40),
    st.sampled_from(["greedy", "best_fit"]),
    st.sampled_from([[], [1], [0, 2]]),
)
def test_what_waits_at_the_end_makes_the_last_packs(samples, strategy, mandatory):
    """A group that has ended is no longer mandatory, and no sample is left over."""
    left = {group: [Thing(group, n, i) for i, (n, g) in enumerate(samples) if g == group] for group in range(3)}

    def choose_group(number):
        return number % 3 if any(left.values()) else None  # also one that has ended

    def fetch(group):
        return left[group].pop(0) if left[group] else None

    packer = BinPacker(PackLimits(80, 100, 60, 50, 4), mandatory, choose_group, fetch, strategy)
    packs = list(iter(packer.next_pack, []))
    assert sorted(thing.number for pack in packs for thing in pack) == list(range(len(samples)))
    assert all(sum(thing.num_tokens for thing in pack) <= 100 for pack in packs)
    assert packer.next_pack() == []
