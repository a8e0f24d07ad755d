"""Which rank counts as slow, from the times that the ranks report."""

import pytest

from megabagel.training.stragglers import RankTimes, is_straggler, slowest_ranks


def ranks(
    work: list[float], data: list[float | None] | None = None, stages: list[int] | None = None
) -> list[RankTimes]:
    table = []
    for number, seconds in enumerate(work):
        median = {"work": seconds, "device": 0.001}
        if data and data[number] is not None:
            median["data"] = data[number]
        table.append(RankTimes(f"node{number}", stages[number] if stages else 0, median, {}))
    return table


def test_the_slowest_rank_is_compared_with_most_ranks():
    found = slowest_ranks(ranks([1.0, 1.02, 1.5, 0.98]))
    assert (found["work"].rank, found["work"].usual) == (2, 1.0)
    assert found["work"].ratio == pytest.approx(1.5)
    assert is_straggler(found, "work", 1.3) and not is_straggler(found, "work", 1.6)
    assert not is_straggler(found, "device", 1.3)


def test_stages_of_a_pipeline_are_not_compared_with_each_other():
    found = slowest_ranks(ranks([1.0, 1.0, 2.0, 2.0], stages=[0, 0, 1, 1]))
    assert found["work"].ratio == 1.0
    found = slowest_ranks(ranks([1.0, 1.4, 2.0, 2.0], stages=[0, 0, 1, 1]))
    assert found["work"].rank == 1 and is_straggler(found, "work", 1.3)


def test_reading_that_takes_long_but_costs_a_step_nothing_is_no_straggler():
    """Only ranks that read are compared."""
    found = slowest_ranks(ranks([1.0] * 4, data=[0.001, None, 0.01, None]))
    assert found["data"].rank == 2 and not is_straggler(found, "data", 1.3)
    found = slowest_ranks(ranks([1.0] * 4, data=[0.01, None, 0.3, None]))
    assert is_straggler(found, "data", 1.3)


def test_a_single_rank_is_its_own_measure():
    found = slowest_ranks(ranks([1.0], data=[0.5]))
    assert {slowest.ratio for slowest in found.values()} == {1.0} and set(found) == {"work", "data", "device"}
