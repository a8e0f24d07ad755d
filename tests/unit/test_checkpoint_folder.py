"""Checkpoint folders: whenever a kill comes, what is whole stays in force; damage is found; locks and retention."""

import json
import os
import shutil
import subprocess
import sys
import threading
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megabagel.checkpoint import folder, lock, retention
from megabagel.checkpoint.errors import CheckpointError
from megabagel.config.checks import ConfigError, check_model
from megabagel.config.checks_files import file_faults
from megabagel.config.schema import Config

CONTENT = {"__0_0.distcp": b"a" * 3000, "__1_0.distcp": b"b" * 2000, "common.pt": b"c" * 500, ".metadata": b"d" * 100}


def save(run_dir: Path, step: int, mark: bytes = b"", metrics: dict[str, float] | None = None) -> Path:
    partial = folder.begin(run_dir, step)
    for name, content in CONTENT.items():
        (partial / name).write_bytes(content + mark)
    return folder.finish(run_dir, step, folder.records(partial), metrics)


def fault(path: Path) -> str | None:
    return folder.damage(path) or folder.verify(path)


def test_a_finished_save_is_whole_and_the_newest(tmp_path):
    path = save(tmp_path, 7, metrics={"validation/loss": 0.5})
    assert path == folder.step_folder(tmp_path, 7) and fault(path) is None
    assert folder.steps_to_try(tmp_path) == [7] and folder.metrics_of(path) == {"validation/loss": 0.5}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000007", folder.LATEST]
    assert folder.manifest(path)["common.pt"] == (500, zlib.crc32(b"c" * 500))


@pytest.mark.parametrize("name", [*CONTENT, folder.METRICS])
def test_a_changed_bit_and_a_missing_end_of_every_file_are_found(tmp_path, name):
    path = save(tmp_path, 1, metrics={"validation/loss": 0.5})
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[:-1])
    assert f"damaged file {name}: {len(whole) - 1} bytes instead of {len(whole)}" in folder.damage(path)
    (path / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert folder.damage(path) is None and f"damaged file {name}: checksum" in folder.verify(path)
    (path / name).unlink()
    assert folder.damage(path) == f"lacks the file {name}"


def test_no_changed_bit_of_the_manifest_hides_a_file_or_stops_the_search(tmp_path):
    path = save(tmp_path, 1)
    whole, files = (path / folder.FILES).read_bytes(), folder.manifest(path)
    found = 0
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        (path / folder.FILES).write_bytes(changed)
        if fault(path):
            found += 1
        else:  # white space, or a name that is gone: nothing false is known of any file
            assert folder.manifest(path).items() <= files.items()
    assert found > len(whole) // 2
    (path / folder.FILES).write_bytes(whole[:-5])
    assert "unreadable files.json" in folder.damage(path)


def test_a_manifest_without_checksums_is_read(tmp_path):
    path = save(tmp_path, 1)
    (path / folder.FILES).write_text(json.dumps({name: len(content) for name, content in CONTENT.items()}))
    assert fault(path) is None
    (path / "common.pt").write_bytes(b"")
    assert "0 bytes instead of 500" in folder.damage(path)


def test_ranks_share_the_files_by_size(tmp_path):
    path = save(tmp_path, 1)
    shares = [folder.share(path, rank, 3) for rank in range(3)]
    assert sorted(sum(shares, [])) == sorted(folder.manifest(path))
    assert shares[0] == ["__0_0.distcp"] and shares[1] == ["__1_0.distcp"]
    assert folder.share(path, 7, 8) == []


class Crash(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def crash_after(monkeypatch, calls: int) -> None:
    """Of all calls that change the disk, let `calls` through, and crash in the next one, half-way in a removal."""
    left = [calls]

    def counted(function, half):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                half(*args)
                raise Crash
            return function(*args, **kwargs)

        return call

    def half_removed(path, *_):
        next(p for p in sorted(Path(path).iterdir()) if p.is_file()).unlink()

    def half_written(path, text, *_):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])

    monkeypatch.setattr(os, "replace", counted(os.replace, lambda *_: None))
    monkeypatch.setattr(os, "fsync", counted(os.fsync, lambda *_: None))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree, half_removed))
    monkeypatch.setattr(Path, "write_text", counted(Path.write_text, half_written))


@pytest.mark.parametrize("step", [2, 3])
def test_a_kill_at_any_moment_of_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path, step):
    """`step` 2 is saved a second time, 3 for the first."""
    crashes = 0
    while True:
        run_dir = tmp_path / f"{crashes}"
        save(run_dir, 1, b"first")
        save(run_dir, 2, b"old")
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, crashes)
            try:
                save(run_dir, step, b"new")
                break
            except Crash:
                crashes += 1
        folder.settle(run_dir)
        newest = folder.step_folder(run_dir, folder.steps_to_try(run_dir)[0])
        assert fault(newest) is None
        content = (newest / "common.pt").read_bytes()
        assert content.endswith((b"old", b"new")) and (newest.name == "iter_0000002" or content.endswith(b"new"))
        assert not [p for p in run_dir.iterdir() if p.suffix in (".partial", ".removed")]
    assert crashes > 10 and (folder.step_folder(run_dir, step) / "common.pt").read_bytes().endswith(b"new")


def test_a_kill_at_any_moment_of_a_removal_leaves_no_half_checkpoint(tmp_path):
    crashes = 0
    while True:
        run_dir = tmp_path / f"{crashes}"
        for step in (1, 2, 3):
            save(run_dir, step)
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, crashes)
            try:
                retention.apply(run_dir, retention.Keep(last=1))
                break
            except Crash:
                crashes += 1
        steps = folder.steps_to_try(run_dir)
        assert steps[0] == 3 and all(fault(folder.step_folder(run_dir, step)) is None for step in steps)
        folder.settle(run_dir)
        assert not [p for p in run_dir.iterdir() if p.suffix == ".removed"]
    assert crashes > 4 and folder.steps_to_try(run_dir) == [3]


def test_a_save_that_does_not_fit_or_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"after step 3 needs 931322\.57 GiB, but only \d+\.\d\d [GM]iB are free"):
        folder.begin(tmp_path, 3, 10**15)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"after step 3 cannot be written there \(Not a directory"):
        folder.begin(tmp_path / "file" / "run", 3)
    partial = folder.begin(tmp_path, 3)
    folder.abandon(tmp_path, 3)
    assert not partial.exists()


LOSS = "validation/loss"


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        ({}, [10, 20, 30, 40, 50, 60]),
        ({"last": 2}, [50, 60]),
        ({"every": 30}, [30, 60]),
        ({"every": 40}, [40, 60]),
        ({"best": 1}, [20, 60]),
        ({"best": 2, "last": 2}, [20, 40, 50, 60]),
        ({"best": 9}, [10, 20, 40, 60]),
        ({"last": 1, "every": 40, "best": 1}, [20, 40, 60]),
        ({"best": 1, "metric": "other"}, [60]),
    ],
)
def test_retention_keeps_the_newest_the_multiples_and_the_best(keep, stay):
    losses = {10: 3.0, 20: 1.0, 30: float("nan"), 40: 2.0, 60: 5.0}
    checkpoints = {step: {LOSS: losses[step]} if step in losses else {} for step in range(10, 70, 10)}
    removed = retention.superfluous(checkpoints, retention.Keep(**{"metric": LOSS, **keep}))
    assert sorted(checkpoints.keys() - set(removed)) == stay and removed == sorted(removed)


def test_retention_leaves_the_only_whole_one_and_the_future_and_damage_alone(tmp_path):
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0)):
        save(tmp_path, step, metrics={LOSS: loss})
    (tmp_path / folder.LATEST).write_text("4\n")
    for step in (2, 4):
        (folder.step_folder(tmp_path, step) / "common.pt").unlink()
    assert retention.apply(tmp_path, retention.Keep(last=1, best=1, metric=LOSS)) == []  # 3: newest whole, 1: best
    assert retention.apply(tmp_path, retention.Keep(last=1)) == [1]
    assert retention.apply(tmp_path, retention.Keep(last=1)) == []
    assert sorted(p.name for p in tmp_path.glob("iter_*")) == [f"iter_000000{step}" for step in (2, 3, 4, 5)]


def test_retention_follows_the_configuration():
    config = Config()
    assert retention.Keep.of(config.checkpoint) == retention.Keep(metric=LOSS)
    config.checkpoint.keep_last = 0
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_last is 0, but must be greater than 0"):
        check_model(config)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(lock, "END_SECONDS", 0.3)
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.1)


def locked_by(run_dir: Path, **changes: object) -> lock.Owner:
    """Write the lock of another machine's process (or another one by `changes`)."""
    owner = replace(lock.Owner.me(), host="elsewhere", boot="other", **changes)
    (run_dir / lock.LOCK).write_text(json.dumps(asdict(owner)))
    return owner


def test_a_second_job_is_refused_at_once_with_the_name_of_the_first(tmp_path):
    program = (
        "import sys; from megabagel.checkpoint import lock\n"
        "with lock.own(sys.argv[1], 0): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = {**os.environ, "SLURM_JOB_ID": "4711"}
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert "held" in first.stdout.readline()
        expected = rf"in use by another job \(process {first.pid} on .*, SLURM job 4711, since 20"
        with pytest.raises(CheckpointError, match=expected), lock.own(tmp_path, 0):
            pass
        with lock.own(tmp_path, 1):  # other ranks do not ask
            pass
    finally:
        first.kill()
        first.wait()
    partial = folder.begin(tmp_path, 1)
    with lock.own(tmp_path, 0):  # killed, so its lock is void, and what it left goes
        assert not partial.exists()
        lock.check_owned(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_owner_on_its_way_out_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "END_SECONDS", 20.0)
    leaving = subprocess.Popen(["sleep", "0.5"])
    owner = replace(lock.Owner.me(), pid=leaving.pid, started=lock._start_of(leaving.pid))
    (tmp_path / lock.LOCK).write_text(json.dumps(asdict(owner)))
    assert owner.is_running()
    with lock.own(tmp_path, 0):
        assert lock._read(tmp_path / lock.LOCK)[0].pid == os.getpid()
    leaving.wait()


def test_the_lock_of_an_unknown_owner_falls_when_its_heart_stops(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "DEAD_SECONDS", 1.2)
    locked_by(tmp_path)
    with lock.own(tmp_path, 0):
        assert "waiting whether it gives a sign of life" in caplog.text and "has ended" in caplog.text
    locked_by(tmp_path)
    os.utime(tmp_path / lock.LOCK, (1, 1))
    caplog.clear()
    with lock.own(tmp_path, 0):
        assert "waiting" not in caplog.text
    (tmp_path / lock.LOCK).touch()  # killed before it wrote its name
    with lock.own(tmp_path, 0):
        assert "taken over" in caplog.text


def test_an_unknown_owner_with_a_heartbeat_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.3)
    owner, done = locked_by(tmp_path), threading.Event()
    beat = threading.Thread(target=lock._beat, args=(tmp_path / lock.LOCK, owner, done))
    beat.start()
    try:
        with pytest.raises(CheckpointError, match="in use by another job .* on elsewhere"), lock.own(tmp_path, 0):
            pass
    finally:
        done.set()
        beat.join()


def test_a_requeued_job_takes_its_own_lock_at_once(tmp_path, monkeypatch):
    locked_by(tmp_path, job="12", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(lock, "_lives", lambda _lock, owner, _beat: owner.is_running() is not False)
    with lock.own(tmp_path, 0):
        assert lock._read(tmp_path / lock.LOCK)[0].restart == 1


def test_workers_that_torchrun_started_again_on_another_machine_take_their_own_lock_at_once(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "12")
    before = replace(lock.Owner.me(), host="elsewhere", boot="other")
    assert before.is_running() is False
    assert replace(before, run="another step of the job").is_running() is None
    assert replace(before, job="").is_running() is None


def test_of_many_jobs_that_find_a_dead_lock_one_gets_it(tmp_path):
    finished = subprocess.Popen([sys.executable, "-S", "-c", ""])
    finished.wait()
    owner = replace(lock.Owner.me(), pid=finished.pid)
    (tmp_path / lock.LOCK).write_text(json.dumps(asdict(owner)))
    outcomes, start = [], threading.Barrier(8)
    done = threading.Event()

    def job():
        start.wait()
        try:
            with lock.own(tmp_path, 0):
                outcomes.append("held")
                done.wait(10)
        except CheckpointError as error:
            outcomes.append(str(error))

    jobs = [threading.Thread(target=job) for _ in range(8)]
    for thread in jobs:
        thread.start()
    while len(outcomes) < 8 and any(thread.is_alive() for thread in jobs):
        threading.Event().wait(0.02)
    done.set()
    for thread in jobs:
        thread.join()
    assert outcomes.count("held") == 1 and sum("in use by another job" in o for o in outcomes) == 7
    assert list(tmp_path.iterdir()) == []


def test_a_job_too_late_to_replace_a_dead_owner_leaves_the_new_one_alone(tmp_path):
    dead, faster = replace(lock.Owner.me(), pid=0), lock.Owner.me()
    lock._create(tmp_path / lock.LOCK, faster)
    claim = tmp_path / f"{lock.LOCK}.{dead.token}"
    lock._create(claim, lock.Owner.me())
    assert not lock._replace(tmp_path / lock.LOCK, dead, claim)
    assert lock._read(tmp_path / lock.LOCK)[0] == faster and not claim.exists()


def test_a_job_that_lost_its_folder_is_told_so(tmp_path):
    with lock.own(tmp_path, 0):
        locked_by(tmp_path)
        with pytest.raises(CheckpointError, match="in use by another job"):
            lock.check_owned(tmp_path)
    assert (tmp_path / lock.LOCK).exists()  # not ours to remove


def test_a_run_folder_that_cannot_be_made_or_written_is_found_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    config = Config()
    config.checkpoint.run_dir = str(tmp_path / "file" / "run")
    assert "cannot be made" in next(file_faults(config))
    with pytest.raises(CheckpointError, match=r"run_dir .* cannot be written \(Not a directory\)"):
        lock.check_writable(tmp_path / "file" / "run")
    lock.check_writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []
