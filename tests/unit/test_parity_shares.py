"""Micro-batches of a golden case: every sample once, as many as the schedule takes, all of one length."""

import sys

import pytest

from tests.tiny_data import GOLDEN

ROOT = GOLDEN.parents[1]
sys.path[:0] = [path for path in (str(ROOT / "tools"),) if path not in sys.path]

from parity.case import load_case  # noqa: E402
from parity.plans import make_shares  # noqa: E402

TILE = 32


@pytest.fixture(scope="module")
def case():
    return load_case(GOLDEN / "public-basic")  # six samples


@pytest.mark.parametrize(
    "replicas, stages, count, empty",
    [(1, 1, 1, 0), (4, 1, 1, 0), (8, 1, 1, 2), (1, 2, 6, 0), (2, 2, 2, 0), (1, 4, 4, 0), (2, 4, 4, 2)],
)
def test_every_sample_trains_once_and_schedules_get_full_groups(replicas, stages, count, empty, case):
    of_replicas = [make_shares(case, replica, replicas, stages, TILE) for replica in range(replicas)]
    assert {len(shares) for shares in of_replicas} == {count}
    shares = [share for shares in of_replicas for share in shares]
    for name, total in (("ce", "ce_loss_indexes"), ("mse", "mse_loss_indexes")):
        rows = sorted(row for share in shares for row in getattr(share, name).tolist())
        assert rows == list(range(len(case.batch[total])))
    lossless = [share for share in shares if not share.plan.ce_rows.numel() and not share.plan.mse_rows.numel()]
    assert len(lossless) == empty
    for share in shares:
        assert share.plan.und_length % TILE == share.plan.gen_length % TILE == 0
        assert share.plan.und_length > share.plan.und_index.numel()
    if stages > 1:
        for shares in of_replicas:
            assert len({share.plan.und_length + share.plan.gen_length for share in shares}) == 1
