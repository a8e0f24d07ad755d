"""Saving in the background: what is copied when, who waits for whom, and where failures come out."""

import threading
from pathlib import Path

import pytest
import torch

from megabagel.checkpoint import folder, saver
from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.pieces import Place
from megabagel.checkpoint.saver import Job, Saver
from megabagel.checkpoint.torch_dist import TorchDist
from megabagel.checkpoint.torch_dist_writer import PieceWriter
from megabagel.config.schema import ParallelConfig
from megabagel.runtime.distributed import destroy, initialize


@pytest.fixture(scope="module", autouse=True)
def one_process():
    initialize(ParallelConfig(), seed=1)
    yield
    destroy()


def job(run_dir: Path, step: int, value: torch.Tensor) -> Job:
    """Weights in two types, one of them of the values' own type."""
    where = tuple(value.shape), (0,) * value.ndim, tuple(value.shape)
    pieces = [*Place("main", *where).whole(value), *Place("w", *where).whole(value)]
    pieces += Place("half", *where).whole(value, torch.bfloat16)
    return Job(run_dir, step, pieces, {"rng/shard_0_1": step}, {"run": {"step": step}})


class Gate:
    """Holds every write back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.reached, self.opened, write = threading.Event(), threading.Event(), PieceWriter.write

        def held_back(*arguments):
            self.reached.set()
            assert self.opened.wait(60)
            return write(*arguments)

        monkeypatch.setattr(PieceWriter, "write", held_back)


def test_the_state_of_the_moment_is_saved_and_the_copy_is_made_once_and_kept(tmp_path, monkeypatch):
    gate, background, value = Gate(monkeypatch), Saver(background=True), torch.arange(12.0).view(3, 4)
    started = job(tmp_path, 1, value)
    background.save(started)
    value.mul_(-1)  # training goes on
    started.common["run"]["step"] = 7
    assert gate.reached.wait(60) and folder.steps_to_try(tmp_path) == []
    gate.opened.set()
    background.wait()
    times = background.take_times()
    assert 0 < times["save_blocked_time"] < times["save_time"] and background.take_times() == {}
    tensors = TorchDist(folder.step_folder(tmp_path, 1))
    before = torch.arange(12.0).view(3, 4)
    assert torch.equal(tensors.read("w"), before) and torch.equal(tensors.read("main"), before)
    assert torch.equal(tensors.read("half"), before.bfloat16())
    common = torch.load(folder.step_folder(tmp_path, 1) / "common.pt")
    assert common["run"]["step"] == 1
    memory = background._memory
    assert len(memory) == 64 + 64  # 48 bytes for both float32 tensors, 24 in half the precision
    background.save(job(tmp_path, 2, value))
    background.wait()
    assert background._memory is memory and folder.latest_step(tmp_path) == 2
    assert torch.equal(TorchDist(folder.step_folder(tmp_path, 2)).read("w"), -before)


def test_the_next_save_waits_for_the_one_before(tmp_path, monkeypatch):
    gate, background, value = Gate(monkeypatch), Saver(background=True), torch.ones(4)
    background.save(job(tmp_path, 1, value))
    second = threading.Thread(target=background.save, args=(job(tmp_path, 2, value),))
    second.start()
    second.join(0.2)
    assert second.is_alive() and folder.steps_to_try(tmp_path) == []
    gate.opened.set()
    second.join()
    background.wait()
    assert folder.steps_to_try(tmp_path) == [2, 1]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_stays(background, tmp_path, monkeypatch):
    writer, value = Saver(background), torch.ones(1000, 1000)
    writer.save(job(tmp_path, 1, value))
    writer.wait()
    begin = folder.begin

    def begin_on_full_disk(*arguments: object) -> Path:
        partial = begin(*arguments)
        (partial / "__0_0.distcp").symlink_to("/dev/full")
        return partial

    monkeypatch.setattr(saver.folder, "begin", begin_on_full_disk)
    with pytest.raises(CheckpointError, match="after step 2 could not be written by rank 0 .No space left on device"):
        writer.save(job(tmp_path, 2, value))
        writer.wait()
    assert folder.latest_step(tmp_path) == 1 and not folder.partial_folder(tmp_path, 2).exists()
    monkeypatch.undo()
    writer.check()  # a failure is said once
    writer.save(job(tmp_path, 2, value))
    writer.wait()
    assert folder.steps_to_try(tmp_path) == [2, 1]


def test_without_a_thread_nothing_is_copied(tmp_path):
    foreground = Saver(background=False)
    foreground.save(job(tmp_path, 1, torch.ones(100)))
    assert folder.latest_step(tmp_path) == 1 and len(foreground._memory) == 0
    assert foreground.take_times().keys() == {"save_time", "save_blocked_time"}
