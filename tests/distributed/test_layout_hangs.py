"""No layout waits for ever when packs lack images or losses, and a wait would be noticed and explained."""

import functools

import pytest

from tests.distributed.layouts import faults, run
from tests.distributed.layouts.compare import FP32, wrong_values
from tests.distributed.layouts.pool import RanksFailedError
from tests.distributed.layouts.table import MODELS, row

WATCHDOG = 60.0  # seconds

# kinds of packs by step; with two replicas the first reads the packs at even places, the second the others
STEPS = (
    ("three images", "no image", "mixed", "no image"),  # images on one replica only
    ("no image", "gen loss only", "no image, no loss", "mixed"),  # losses of one kind on each
    ("mixed", "no loss", "und only", "no image, no loss"),  # losses on one replica only
    ("no image", "und only", "no image", "no image"),  # nothing carries MSE
    ("gen loss only", "gen loss only", "no loss", "gen loss only"),  # nothing carries CE
    ("no loss", "no image, no loss", "no loss", "no loss"),  # nothing carries any loss
    ("no image", "no image", "no image", "no image"),  # no picture anywhere
)
LAYOUTS = {
    "DP2": row(2),
    "DP2 overlap": row(2, reduce=True, gather=True),
    "TP2": row(2, tp=2),
    "TP2+SP": row(2, tp=2, sp=True),
    "PP2": row(2, pp=2),
    "PP2 x VP2 x DP2 overlap": row(4, pp=2, vp=2, reduce=True, gather=True),
    "CP2": row(2, cp=2),
    "DP2 x EP2": row(2, ep=2, reduce=True, gather=True),
    "DP2 x EP2, sparse": row(2, "sparse", ep=2, reduce=True, gather=True),
}


@pytest.fixture(scope="module")
def reference(pool):
    @functools.cache
    def train(model: str) -> run.Trained:
        return pool.run(run.train, MODELS[model], STEPS, processes=1, limit=WATCHDOG)[0]

    return train


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_rank_hangs_when_packs_lack_images_or_losses(name, pool, reference):
    layout = LAYOUTS[name]
    ranks = pool.run(run.train, layout.options, STEPS, processes=layout.processes, limit=WATCHDOG)
    assert wrong_values(ranks, reference(layout.model), FP32) == {}


def test_a_hang_is_ended_with_the_stacks_of_all_ranks_and_the_pool_works_again(pool):
    with pytest.raises(RanksFailedError, match="not finished after 3 s") as failure:
        pool.run(faults.hang_on_rank_1, processes=2, limit=3)
    before, _, after = str(failure.value).partition("rank 1 was at:")
    assert "all_reduce" in before and "hang_on_rank_1" in after
    assert pool.run(faults.nothing, processes=8, limit=WATCHDOG) == [8] * 8


def test_the_traceback_of_a_failing_rank_reaches_the_test(pool):
    with pytest.raises(RanksFailedError, match="rank 1: Traceback(.|\n)*KeyError: 'what rank 1 has to say'"):
        pool.run(faults.fail_on_rank_1, processes=2, limit=WATCHDOG)


def test_a_rank_that_dies_is_named(pool):
    with pytest.raises(RanksFailedError, match="rank 1: the process died with exit code 3"):
        pool.run(faults.die_on_rank_1, processes=2, limit=WATCHDOG)
