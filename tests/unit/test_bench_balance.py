"""The realistic mix packs as promised: budgets used, ranks even, samples near their draws."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megabagel.config.schema import ModelConfig
from megabagel.packing import native
from megabagel.packing.balance import fill_limit

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import bench_balance as bench

pytestmark = pytest.mark.skipif(native.PLANNER is None, reason="the C++ planner is not built")


@pytest.fixture(scope="module")
def stream():
    return bench.draw_stream(4000, ModelConfig())


@pytest.fixture(scope="module")
def packs(stream):
    limit = fill_limit(bench.LIMITS.max_num_tokens, bench.LIMITS.max_num_tokens_per_sample)
    return bench.packs_of(stream, "best_fit", replace(bench.LIMITS, max_num_tokens=limit), ())


@pytest.mark.parametrize(("ranks", "per_rank"), [(8, 1), (8, 4), (64, 1), (64, 4)])
def test_balanced_packs_use_the_budget_and_give_all_ranks_equal_work(stream, packs, ranks, per_rank):
    balanced, _ = bench.balanced_steps(stream, packs, ranks * per_rank, ())
    assert bench.fill(stream, balanced) >= 0.98
    assert bench.imbalance(bench.by_rank(bench.costs_of(stream, balanced), ranks, per_rank))[1] <= 1.03


def test_ranks_that_pack_for_themselves_are_less_even(stream):
    assert bench.imbalance(bench.random_work(stream, 8, 1, ()))[0] > 1.04


def test_balancing_leaves_a_sample_in_its_step(stream, packs):
    balanced, _ = bench.balanced_steps(stream, packs, 8, ())
    for first in range(0, len(balanced), 8):
        together = [sorted(sum(of[first : first + 8], [])) for of in (balanced, packs)]
        assert together[0] == together[1]


def test_displacement_counts_from_the_order_of_the_draws():
    stream = bench.Stream(*np.array([[10] * 4, [1] * 4, [0] * 4]))
    assert bench.displacement([[0, 1], [2, 3]], stream) == {unit: [0, 0, 0] for unit in ("samples", "packs", "steps")}
    assert bench.displacement([[2, 3], [0, 1]], stream, per_step=2) == {
        "samples": [2, 2, 2],
        "packs": [1, 1, 1],
        "steps": [0, 0, 0],
    }
