"""Kills, full and read-only disks, damage, strangers: always a whole checkpoint is in force, or there is a sentence."""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from megabagel.checkpoint import folder, lock
from megabagel.runtime.events import EVENTS_FILE
from tests.distributed import forked, save_faults
from tests.distributed.layouts.pool import Pool, RanksFailedError
from tests.tiny_data import training_options, write_data

LIMIT = 60.0
KILLS = 20


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "small-disk", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_kill_of_any_rank_at_any_moment_of_a_save_leaves_a_whole_checkpoint(pair, tmp_path):
    run_dir, draw = tmp_path / "run", random.Random(5)
    seconds = max(pair.run(save_faults.save_steps, str(run_dir), [1, 2], processes=2, limit=LIMIT))
    before = 2
    for _ in range(KILLS):
        doomed, delay = draw.randrange(2), draw.uniform(0, 3 * seconds)
        with pytest.raises(RanksFailedError, match=rf"rank {doomed}: the process died with exit code -9"):
            pair.run(save_faults.save_until_killed, str(run_dir), doomed, delay, processes=2, limit=LIMIT)
        newest = folder.latest_step(run_dir)
        path = folder.step_folder(run_dir, newest)
        assert folder.damage(path) is None and folder.verify(path) is None
        known = run_dir / "known.json"
        assert newest >= max(before, json.loads(known.read_text()) if known.exists() else 0)
        before = newest
    assert pair.run(save_faults.resume, str(run_dir), processes=2, limit=LIMIT)[0] >= before > 2
    assert all(step % 10 == 0 for step in folder.steps_to_try(run_dir)[3:])  # two stay, and one may wait for removal
    assert not list(run_dir.glob("*.lock.*")) and len(list(run_dir.glob("*.partial"))) <= 1


def test_damage_of_every_kind_of_file_is_noticed_and_the_checkpoint_before_is_loaded(pair, tmp_path):
    pair.run(save_faults.save_steps, str(tmp_path), [1, 2], processes=2, limit=LIMIT)
    found = pair.run(save_faults.resume_after_damage, str(tmp_path), 2, processes=2, limit=LIMIT)
    assert found[0] == found[1]
    assert found[0].pop("whole") == 2
    assert len(found[0]) == 8 and set(found[0].values()) == {1}, found[0]


@pytest.mark.parametrize("background", [True, False])
def test_a_write_that_fails_on_one_rank_stops_all_with_one_sentence(pair, tmp_path, background):
    run_dir = tmp_path / "run"
    ranks = pair.run(save_faults.fail_then_save, str(run_dir), "limit", background, processes=2, limit=LIMIT)
    for found in ranks:
        assert "the checkpoint after step 2 could not be written by rank 1 (File too large" in found["said"]
        assert found["start"] == "nothing"
        assert found["left"] == [EVENTS_FILE, "iter_0000001", folder.LATEST]
        assert (found["resumed"], found["then"]) == (1, 3)


@pytest.mark.parametrize("how", ["full before", "full after"])
def test_a_full_disk_stops_the_save_before_or_in_its_middle(pair, small_disk, how):
    run_dir = small_disk / "run"
    ranks = pair.run(save_faults.fail_then_save, str(run_dir), how, True, processes=2, limit=LIMIT)
    said = {"full before": "but only 0.02 MiB are free", "full after": "(No space left on device"}[how]
    for found in ranks:
        assert "checkpoint after step 2" in found["said"] and said in found["said"]
        assert (said in found["start"]) == (how == "full before")
        assert found["left"] == [EVENTS_FILE, "iter_0000001", folder.LATEST]
        assert (found["resumed"], found["then"]) == (1, 3)


def test_a_read_only_folder_is_named_at_the_start_and_at_a_save(pair, small_disk):
    run_dir = small_disk / "run"
    pair.run(save_faults.save_steps, str(run_dir), [1], processes=2, limit=LIMIT)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for found in pair.run(save_faults.save_into_read_only, str(run_dir), processes=2, limit=LIMIT):
        assert "cannot be written (Read-only file system)" in found["start"]
        assert "after step 5 cannot be written there (Read-only file system" in found["save"]
    assert folder.steps_to_try(run_dir) == [1] and folder.verify(folder.step_folder(run_dir, 1)) is None
    assert not os.access(run_dir, os.W_OK)


def test_a_run_folder_in_use_is_refused_at_the_start_with_the_name_of_the_job(tmp_path):
    owner = lock.Owner.me()
    (tmp_path / lock.LOCK).write_text(json.dumps(asdict(owner)))
    options = training_options(write_data(tmp_path / "data", ("text",)), tmp_path)
    result = forked.run("megabagel.train", *options, processes=1, timeout=120)
    assert result.returncode != 0 and f"is in use by another job ({owner})" in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", lock.LOCK]


def test_a_checkpoint_of_another_architecture_is_refused_with_the_tensors_named(pair, tmp_path):
    pair.run(save_faults.save_steps, str(tmp_path), [1], processes=2, limit=LIMIT)
    for said in pair.run(save_faults.load_as_another_model, str(tmp_path), processes=2, limit=LIMIT):
        assert "does not fit this model" in said and "block.extra.weight is missing (expected (2, 2))" in said
        assert "project_out.weight (16, 16) is not part of the model" in said
        assert "has shape (2, " in said and "(expected (1, " in said
