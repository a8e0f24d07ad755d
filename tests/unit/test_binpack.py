"""Greedy packing: limits hold, nothing is lost, mandatory groups come first."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabagel.packing.binpack import BinPacker, PackLimits

LIMITS = PackLimits(
    expected_num_tokens=80, max_num_tokens=100, max_num_tokens_per_sample=60, prefer_buffer_before=50, max_buffer_size=2
)


@dataclass
class Thing:
    group_index: int
    num_tokens: int
    number: int


def packer(lengths, mandatory=(), limits=LIMITS, num_groups=2):
    """Groups are drawn in turn; every group hands out `lengths` in order, without end."""
    fetched: list[Thing] = []

    def fetch(group):
        fetched.append(Thing(group, lengths[len(fetched) % len(lengths)], len(fetched)))
        return fetched[-1]

    return BinPacker(limits, list(mandatory), lambda draw: draw % num_groups, fetch), fetched


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=30),
    st.sampled_from([(), (1,), (0, 1)]),
    st.integers(0, 3),
    st.integers(0, 100),
)
def test_limits_hold_and_nothing_is_lost_or_repeated(lengths, mandatory, buffer_size, prefer):
    limits = PackLimits(80, 100, 60, prefer, buffer_size)
    bins, fetched = packer(lengths, mandatory, limits)
    used = []
    for _ in range(30):
        pack = bins.next_pack()
        assert pack and sum(thing.num_tokens for thing in pack) <= 100
        used += pack
    waiting = [thing.number for thing in bins.buffer]
    assert sorted([thing.number for thing in used] + waiting) == list(range(len(fetched)))
    assert not bins.open


def test_packs_close_at_the_expected_length_and_begin_with_mandatory_groups():
    bins, _ = packer([10], mandatory=[1])
    for _ in range(3):
        pack = bins.next_pack()
        assert len(pack) == 8 and pack[0].group_index == 1


def test_overflow_waits_and_goes_first_into_the_next_pack():
    bins, _ = packer([50, 60, 40, 10])
    assert [thing.num_tokens for thing in bins.next_pack()] == [50, 40]
    assert [thing.num_tokens for thing in bins.buffer] == [60]
    assert bins.next_pack()[0].num_tokens == 60


def test_a_full_buffer_closes_the_pack_without_losing_the_sample():
    bins, _ = packer([60, 60, 60, 60, 5])
    assert [thing.num_tokens for thing in bins.next_pack()] == [60]
    assert len(bins.buffer) == 3
    assert bins.next_pack()[0].number == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("expected_num_tokens", 101, r"data.expected_num_tokens is 101, .* 1 .. data.max_num_tokens \(100\)"),
        ("max_num_tokens_per_sample", 101, r"data.max_num_tokens_per_sample is 101, .* must hold at least one sample"),
    ],
)
def test_budgets_that_contradict_each_other_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        PackLimits(**{**vars(LIMITS), field: value})
