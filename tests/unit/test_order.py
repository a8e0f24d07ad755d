"""Order, mixture and random draws: permutations, sharding, locality, stability."""

from collections import Counter

import numpy as np
import pytest

from megabagel.data.faults import DataError
from megabagel.data.mixture import Mixture
from megabagel.data.order import GroupOrder, permute, round_keys
from megabagel.runtime import rng


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 257])
def test_permute_is_a_permutation(size):
    keys = round_keys(1, "test", (size,))
    assert sorted(permute(i, size, keys) for i in range(size)) == list(range(size))


def test_permutation_looks_random():
    keys = round_keys(1, "test", (0,))
    image = np.array([permute(i, 1000, keys) for i in range(1000)])
    assert abs(np.corrcoef(np.arange(1000), image)[0, 1]) < 0.1
    assert (np.diff(image) == 1).sum() < 10


@pytest.mark.parametrize("window", [None, 1, 2])
def test_each_pass_visits_every_row_once_in_another_order(window):
    order = GroupOrder([4, 0, 3, 5, 1], seed=3, group_index=0, window=window)
    assert order.num_rows == 13
    passes = [[order.row(position) for position in range(p * 13, (p + 1) * 13)] for p in range(3)]
    for number, visits in enumerate(passes):
        assert {visit for visit, _ in visits} == {number}
        assert sorted(row for _, row in visits) == list(range(13))
    rows = [[row for _, row in visits] for visits in passes]
    assert rows[0] != rows[1] != rows[2]
    assert order.row(5) == GroupOrder([4, 0, 3, 5, 1], seed=3, group_index=0, window=window).row(5)


def test_a_reader_needs_only_a_window_of_blocks_at_a_time():
    order = GroupOrder([10] * 20, seed=3, group_index=0, window=2)
    for start in range(0, 200, 20):
        assert len({order.row(position)[1] // 10 for position in range(start, start + 20)}) == 2


def test_mixture_follows_the_weights_and_never_draws_weight_zero():
    mixture = Mixture({"a": 3.0, "b": 0.0, "c": 1.0}, seed=1)
    counts = Counter(mixture.group(draw) for draw in range(2000))
    assert set(counts) == {0, 2}
    assert 0.70 < counts[0] / 2000 < 0.80
    other = Mixture({"a": 3.0, "b": 0.0, "c": 1.0}, seed=2)
    assert [mixture.group(draw) for draw in range(50)] != [other.group(draw) for draw in range(50)]


def test_groups_that_have_ended_leave_their_share_to_the_others():
    mixture = Mixture({"a": 6.0, "b": 1.0, "c": 3.0}, seed=1)
    counts = Counter(mixture.group(draw, ended=[0]) for draw in range(2000))
    assert set(counts) == {1, 2}
    assert 0.70 < counts[2] / 2000 < 0.80
    assert mixture.group(0, ended=[0, 1, 2]) is None
    assert Mixture({"a": 1.0, "b": 0.0}, seed=1).group(0, ended=[0]) is None


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0, "b": 2.0}])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(DataError, match="weights must be >= 0"):
        Mixture(weights, seed=1)


def test_draws_depend_on_seed_purpose_and_key_and_never_change():
    first = rng.normal(1, "flow", (2, 3), (4,))
    assert first.dtype == np.float32 and first.shape == (4,)
    assert np.array_equal(first, rng.normal(1, "flow", (2, 3), (4,)))
    for other in (rng.normal(2, "flow", (2, 3), 4), rng.normal(1, "x", (2, 3), 4), rng.normal(1, "flow", (2, 4), 4)):
        assert not np.array_equal(first, other)
    # A longer draw begins with the shorter one: images of a key may be drawn in any chunking.
    assert np.array_equal(first, rng.normal(1, "flow", (2, 3), (2, 4))[0])
    assert rng.integers(1, "a", (0,), 5, 8, 100).min() == 5 and rng.integers(1, "a", (0,), 5, 8, 100).max() == 7
    assert 0 <= rng.uniform(1, "a", (0,)) < 1
    # Frozen values: a change here breaks resume and reproducibility of every run.
    assert rng.integers(42, "frozen", (1, 2), 0, 1000, 4).tolist() == FROZEN


FROZEN = [748, 184, 640, 587]
