"""Local checkpoints: the newest that all ranks have is continued, to the bit; otherwise the one in the run folder."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megabagel.checkpoint import folder, local
from tests.distributed.layouts import local as program
from tests.distributed.layouts.compare import FP32
from tests.distributed.layouts.pool import Pool
from tests.distributed.layouts.table import row

LIMIT = 150.0
LAYOUT, OTHER = row(2, "frozen ViT", pp=2), row(2, "frozen ViT", tp=2)
NEWEST, OLDER = max(program.LOCAL), min(program.LOCAL)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


@dataclass
class Trained:
    """A run's folders and what its ranks reported."""

    run_dir: Path
    local_dir: Path
    ranks: list[program.Continued]

    def of_rank(self, rank: int, step: int) -> Path:
        (found,) = self.local_dir.glob(f"*/rank_{rank:05d}")
        return folder.step_folder(found, step)


@pytest.fixture(scope="module")
def trained(pool, tmp_path_factory) -> Trained:
    base = tmp_path_factory.mktemp("base")
    arguments = LAYOUT.options, str(base / "run"), str(base / "node")
    return Trained(base / "run", base / "node", pool.run(program.train, *arguments, processes=2, limit=LIMIT))


@pytest.fixture
def copy(trained, tmp_path) -> Trained:
    for path in (trained.run_dir, trained.local_dir):
        shutil.copytree(path, tmp_path / path.name)
    return Trained(tmp_path / "run", tmp_path / "node", trained.ranks)


def resume(pool: Pool, run: Trained, layout=LAYOUT) -> list[program.Continued]:
    arguments = layout.options, str(run.run_dir), str(run.local_dir)
    return pool.run(program.resume, *arguments, processes=layout.processes, limit=LIMIT)


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 16
    path.write_bytes(whole)


def go_back_in_time(run: Trained) -> None:
    """As a person does who wants the step before, and keeps the newer one."""
    shutil.copytree(folder.step_folder(run.run_dir, 1), folder.step_folder(run.run_dir, 2))


CASES: dict[str, tuple[Callable[[Trained], object], int]] = {
    "newest": (lambda run: None, NEWEST),
    "the newest of a rank is damaged": (lambda run: flip(run.of_rank(1, NEWEST) / "__1_0.distcp"), OLDER),
    "the newest of a rank is missing": (lambda run: shutil.rmtree(run.of_rank(0, NEWEST)), OLDER),
    "a node was replaced": (lambda run: shutil.rmtree(run.of_rank(1, NEWEST).parent), program.SHARED),
    "another run had the folder": (
        lambda run: (run.run_dir / local.RUN_ID).write_text("another\n"),
        program.SHARED,
    ),
    "the latest file was set back": (go_back_in_time, program.SHARED),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_continues_to_the_bit_from_the_newest_that_all_ranks_have(name, pool, trained, copy):
    change, expected = CASES[name]
    change(copy)
    for (step, values, tensors), (_, all_values, all_tensors) in zip(resume(pool, copy), trained.ranks, strict=True):
        assert step == expected
        assert values[-1:] == all_values[-1:] and len(values) == len(program.STEPS) - step
        assert len(tensors) > 0 and all(map(torch.equal, tensors, all_tensors))


def test_another_layout_takes_the_one_in_the_run_folder(pool, trained, copy):
    continued = resume(pool, copy, OTHER)
    assert {step for step, *_ in continued} == {program.SHARED}
    found, expected = continued[-1][1][-1], trained.ranks[-1][1][-1]
    for value in ("ce", "mse", "grad_norm"):
        assert getattr(found, value) == pytest.approx(getattr(expected, value), rel=FP32)
