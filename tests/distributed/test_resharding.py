"""A checkpoint of every layout is loaded in every other: the same state to the bit, and the run goes on equally.

What the ranks do is `layouts/reshard.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.distributed.layouts import reshard
from tests.distributed.layouts.compare import FP32
from tests.distributed.layouts.pool import Pool
from tests.distributed.layouts.table import Row, row

LIMIT = 240.0  # seconds for one layout, many times what it takes
# within a group every layout loads what every layout saved
GROUPS: dict[str, dict[str, Row]] = {
    "plain": {
        "1": row(1),
        "TP2": row(2, tp=2),
        "PP2": row(2, pp=2),
        "TP2 x PP2": row(4, tp=2, pp=2),
        "PP2 x VP2": row(2, pp=2, vp=2),
        "EP2, modality experts": row(2, ep=2),
        "CP2": row(2, cp=2),
        "DP2": row(2),
    },
    "sparse experts": {
        "1": row(1, "sparse"),
        "EP2": row(2, "sparse", ep=2),
        "TP2+SP x PP2 x EP2": row(4, "sparse", tp=2, sp=True, pp=2, ep=2),
    },
    "frozen ViT": {"PP2 x CP2": row(4, "frozen ViT", pp=2, cp=2), "DP2": row(2, "frozen ViT")},
    "tied": {"PP2": row(2, "tied", pp=2), "TP2": row(2, "tied", tp=2)},
    "uneven": {
        "TP2+SP x EP4, one rank for und": row(4, tp=2, sp=True, ep=4, und=1),
        "PP2 x EP2, first stage of 1": row(4, pp=2, ep=2, first=1),
    },
}
LOADS = [(group, layout) for group, layouts in GROUPS.items() for layout in layouts]


@dataclass
class Saved:
    """A run folder with a checkpoint, and what the ranks that wrote it reported."""

    run_dir: str
    ranks: list[reshard.Continued]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(4)  # the largest layout here
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory) -> dict[str, dict[str, Saved]]:
    """By group and layout."""
    runs = {}
    for group, layouts in GROUPS.items():
        runs[group] = {}
        for name, layout in layouts.items():
            run_dir = str(tmp_path_factory.mktemp("run"))
            ranks = pool.run(reshard.save, layout.options, run_dir, processes=layout.processes, limit=LIMIT)
            runs[group][name] = Saved(run_dir, ranks)
    return runs


@pytest.mark.parametrize(("group", "name"), LOADS)
def test_every_checkpoint_continues_in_every_layout(group, name, pool, saved):
    layout = GROUPS[group][name]
    runs = saved[group]
    run_dirs = [run.run_dir for run in runs.values()]
    ranks = pool.run(reshard.load, layout.options, run_dirs, processes=layout.processes, limit=LIMIT)
    for (origin, run), reports in zip(runs.items(), zip(*ranks, strict=True), strict=True):
        assert set().union(*(r.differing for r in reports)) == set(), origin
        assert set().union(*(r.held for r in reports)) == set().union(*(r.held for r in run.ranks))
        assert {r.counters for r in reports} == {r.counters for r in run.ranks}
        if origin == name:
            assert [r.steps for r in reports] == [r.steps for r in run.ranks]
        for step, expected in zip(reports[-1].steps, run.ranks[-1].steps, strict=True):  # the last rank holds losses
            for value in ("ce", "mse", "grad_norm"):
                assert getattr(step, value) == pytest.approx(getattr(expected, value), rel=FP32), (origin, value)


def test_a_single_other_bit_is_noticed(pool, saved):
    run = saved["plain"]["TP2"]
    path = Path(run.run_dir) / reshard.WHOLE
    whole = torch.load(path)
    name = "language_model.model.layers.3.mlp_moe_gen.down_proj.weight"
    whole["exp_avg_sq"][name].view(torch.int32)[5, 7] ^= 1
    tampered = Path(run.run_dir).with_name("tampered")
    tampered.mkdir()
    for entry in Path(run.run_dir).iterdir():
        (tampered / entry.name).symlink_to(entry)
    (tampered / reshard.WHOLE).unlink()
    torch.save(whole, tampered / reshard.WHOLE)
    ((report,),) = pool.run(reshard.load, {}, [str(tampered)], processes=1, limit=LIMIT)
    assert report.differing == {("exp_avg_sq", name)}
    assert {kind for kind, _ in report.held} == {"weights", "main", "exp_avg", "exp_avg_sq", "ema"}
