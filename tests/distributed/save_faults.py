"""What the ranks of test_save_faults.py do: a small run whose state is a formula of step and rank, saved and hurt.

Each function runs on every rank of a process group that has been started; arguments and results are plain values.
"""

import contextlib
import itertools
import json
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megabagel.checkpoint import distributed as checkpoint
from megabagel.checkpoint import folder, space
from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.lock import own
from megabagel.checkpoint.retention import Keep
from megabagel.checkpoint.saver import Saver
from megabagel.config.schema import ParallelConfig
from megabagel.runtime.distributed import initialize
from megabagel.runtime.overlap import publish_main_parameters
from tests.distributed.checkpoint_program import PACKS, Run


class Known(Run):
    """A run whose state after `step` updates is known without any update."""

    def __init__(self, num_layers: int = 2):
        parallel = ParallelConfig()
        super().__init__(initialize(parallel, seed=7), parallel, num_layers=num_layers)
        self.train(1)  # the moments exist from now on

    def become(self, step: int) -> None:
        """Take the state of `step`."""
        inner = self.optimizer.chained_optimizers[0].optimizer
        mains = [p for group in inner.param_groups for p in group["params"]]
        moments = [t for s in inner.state.values() for t in (s["exp_avg"], s["exp_avg_sq"])]
        with torch.no_grad():
            for index, tensor in enumerate([*mains, *moments, *self.ema.shards]):
                place = torch.arange(tensor.numel(), dtype=torch.float32).view(tensor.shape) / 1024
                tensor.copy_(place + index + 0.5 * self.layout.rank + 100 * step)
        publish_main_parameters(self.optimizer)
        self.step = step

    def resume(self, run_dir: str) -> int:
        """Load; the step, 0 where there is no checkpoint. Every tensor must be that of its step, to the bit."""
        if self.load(Path(run_dir)) is None:
            return 0
        found = self.tensors()
        self.become(self.step)
        assert all(map(torch.equal, found, self.tensors())), f"step {self.step} is not what was saved"
        return self.step

    def save_to(self, run_dir: str, saver: Saver) -> None:
        checkpoint.save(
            run_dir, self.step, self.chunks, self.optimizer, self.ema, data_state={"counts": [self.step]},
            counters={"samples": self.step * PACKS}, config_yaml="", metrics={"validation/loss": 1 / self.step},
            saver=saver,
        )  # fmt: skip


def save_until_killed(run_dir: str, doomed: int, delay: float) -> None:
    """Continue, then save step after step in the background; rank `doomed` is killed `delay` seconds after the start.

    Rank 0 notes in RUN_DIR/known.json up to which step all ranks know that it was saved.
    """
    with own(run_dir, dist.get_rank()):
        run, saver = Known(), Saver(background=True, keep=Keep(last=2, every=10))
        start = run.resume(run_dir)
        dist.barrier()
        if run.layout.rank == doomed:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        for step in itertools.count(start + 1):
            run.become(step)
            run.save_to(run_dir, saver)  # has waited for the one before
            if run.layout.rank == 0 and step > start + 1:
                note = Path(run_dir, "known.tmp")
                note.write_text(json.dumps(step - 1))
                note.replace(Path(run_dir, "known.json"))


def save_steps(run_dir: str, steps: list[int], num_layers: int = 2) -> float:
    """Save these steps one after the other in the background; -> seconds that one took."""
    run, saver = Known(num_layers), Saver(background=True)
    for step in steps:
        run.become(step)
        run.save_to(run_dir, saver)
    saver.wait()
    return saver.take_times()["save_time"]


def resume(run_dir: str) -> int:
    """-> the step that a new run continues from, with the content of that step."""
    return Known().resume(run_dir)


def resume_after_damage(run_dir: str, step: int) -> dict[str, int]:
    """Hurt each kind of file of the checkpoint after `step`, one at a time -> the step that is loaded instead."""
    run, found = Known(), {}
    path = folder.step_folder(run_dir, step)
    tensors = max(path.glob("*.distcp"), key=lambda p: p.stat().st_size).name
    for name in (tensors, "common.pt", ".metadata", folder.FILES):
        for kind in ("truncated", "flipped"):
            with _hurt(path / name, kind):
                found[f"{name.strip('.').split('.')[-1]} {kind}"] = run.resume(run_dir)
    found["whole"] = run.resume(run_dir)
    return found


@contextlib.contextmanager
def _hurt(path: Path, kind: str) -> Iterator[None]:
    whole = path.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes(whole[:middle] if kind == "truncated" else flipped)
    dist.barrier()
    yield
    dist.barrier()
    if dist.get_rank() == 0:
        path.write_bytes(whole)
    dist.barrier()


def fail_then_save(run_dir: str, how: str, background: bool) -> dict[str, object]:
    """Save step 1; step 2 fails by `how` (see `_failing`) on some rank; then it works again.

    -> what a start said then and what the save said, and which folders were there after the failure.
    """
    run, saver = Known(), Saver(background=background)
    run.become(1)
    run.save_to(run_dir, saver)
    saver.wait()
    run.become(2)
    with _failing(how, Path(run_dir)):
        start = _said(lambda: space.check(run_dir, run.optimizer, True))
        said = _said(lambda: (run.save_to(run_dir, saver), saver.wait()))
    dist.barrier()
    left = sorted(p.name for p in Path(run_dir).iterdir())
    resumed = run.resume(run_dir)
    run.become(3)
    run.save_to(run_dir, saver)
    saver.wait()
    return {"start": start, "said": said, "left": left, "resumed": resumed, "then": run.resume(run_dir)}


@contextlib.contextmanager
def _failing(how: str, run_dir: Path) -> Iterator[None]:
    """`limit`: no file of rank 1 may grow beyond 4 KiB. `full before`, `full after`: something else fills the disk
    before or after rank 0 looked at the space that is free."""
    if how == "limit":
        with _file_limit(4096) if dist.get_rank() == 1 else contextlib.nullcontext():
            yield
        return
    filler = run_dir.parent / "filler"
    if dist.get_rank() > 0:
        dist.barrier()
        yield
        dist.barrier()
        return
    if how == "full before":
        _fill(filler, leave=16 << 10)
        dist.barrier()
        yield
    else:
        begin = folder.begin

        def then_fill(*arguments):
            partial = begin(*arguments)
            _fill(filler, leave=16 << 10)
            return partial

        folder.begin = then_fill
        try:
            dist.barrier()
            yield
        finally:
            folder.begin = begin
    dist.barrier()
    filler.unlink()


@contextlib.contextmanager
def _file_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _fill(path: Path, leave: int) -> None:
    disk = os.statvfs(path.parent)
    with path.open("wb") as file:
        file.write(bytes(disk.f_bavail * disk.f_frsize - leave))


def _said(action: object) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "nothing"


def save_into_read_only(run_dir: str) -> dict[str, str]:
    """What the start of a run and a save say of a folder that became read-only."""
    with contextlib.ExitStack() as stack:
        start = _said(lambda: stack.enter_context(own(run_dir, dist.get_rank())))
    run = Known()
    run.become(5)
    return {"start": start, "save": _said(lambda: run.save_to(run_dir, Saver(background=False)))}


def load_as_another_model(run_dir: str) -> str:
    """What is said about a checkpoint of two layers by a model that has one, and another part than its last one."""
    run = Known(num_layers=1)
    stage = run.chunks[0].module
    stage.project_out = nn.Identity()
    stage.block.extra = nn.Linear(2, 2)
    before = run.tensors()
    said = _said(lambda: run.load(Path(run_dir)))
    assert all(map(torch.equal, before, run.tensors()))  # nothing was loaded
    return said
