"""Writes checkpoints while training goes on: copies the state aside, and a thread writes the copies.

What belongs into a checkpoint is `distributed`'s business, the form of its files `torch_dist_writer`'s.
"""

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megabagel.checkpoint import folder, lock, retention
from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.local import LocalJob
from megabagel.checkpoint.pieces import Piece
from megabagel.checkpoint.torch_dist_writer import PieceWriter, Written, finish
from megabagel.runtime import events

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=6)  # how long the fastest rank waits for the slowest one's disk
_ALIGNMENT = 64  # bytes; copies begin at multiples of it


@dataclass(frozen=True)
class Job:
    """One checkpoint: this rank's pieces and objects, and what rank 0 writes for all (`common`, `metrics`)."""

    run_dir: str | Path
    step: int
    pieces: Sequence[Piece]
    objects: dict[str, object]
    common: dict[str, object]
    metrics: Mapping[str, float] | None = None


class Saver:
    """Saves one checkpoint after the other; all ranks have one and call `save` for the same steps in the same order.

    `background`: `save` returns as soon as the state is copied, into memory that is kept for the next time, and the
    rest happens in a thread with a process group of its own. Otherwise nothing is copied and it returns when the
    checkpoint is on disk and the newest. `keep`: which older ones stay then.
    """

    def __init__(self, background: bool, keep: retention.Keep = retention.EVERYTHING):
        self.background = background
        self._keep = keep
        self._group: dist.ProcessGroup | None = None  # None: the default group
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._times: dict[str, float] = {}
        self.longest = 0.0  # seconds of the longest save so far

    def save(self, job: Job | LocalJob) -> None:
        """Start to write a checkpoint; a save that still goes on is waited for.

        Raises what `check` raises, and CheckpointError on all ranks when it does not work out in the foreground.
        """
        begin = time.perf_counter()
        self.wait()
        if self.background:
            if self._group is None:
                self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            staged = replace(job, pieces=self._stage(job.pieces), common=copy.deepcopy(job.common))
            # a daemon: a process that fails must not wait for others that it will never hear of
            blocked = time.perf_counter() - begin
            self._thread = threading.Thread(target=self._run, args=(staged, begin, blocked), name="save", daemon=True)
            self._thread.start()
        else:
            self._run(job, begin, None)
        self._times["save_blocked_time"] = time.perf_counter() - begin
        self.check()

    def check(self) -> None:
        """Raise the error of a save that has failed: the same CheckpointError on all ranks. Asks nobody, costs nothing.

        An error of another type is a lost peer or a bug.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Return when no save goes on; raises what `check` raises."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def take_times(self) -> dict[str, float]:
        """Seconds, once each: `save_blocked_time` that the last `save` took, `save_time` until it was on disk."""
        return {name: self._times.pop(name) for name in list(self._times)}

    def _run(self, job: Job | LocalJob, begin: float, blocked: float | None) -> None:
        try:
            size = job.write() if isinstance(job, LocalJob) else _write(job, self._group, self._keep)
        except BaseException as error:  # the main thread raises it
            self._failure = error
            return
        seconds = time.perf_counter() - begin
        self._times["save_time"] = seconds
        self.longest = max(self.longest, seconds)
        if dist.get_rank() == 0:
            if job.run_dir is not None and size:
                details = {"seconds": seconds, "blocked": seconds if blocked is None else blocked}
                with contextlib.suppress(OSError):  # the checkpoint is whole without it
                    events.record(job.run_dir, "save", step=job.step, **details, local=isinstance(job, LocalJob))
            logger.info("checkpoint after step %d: %.2f GB written in %.1f s", job.step, size / 1e9, seconds)

    def _stage(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces with copies of their data on the CPU, in the types that the checkpoint has."""
        places, size = {}, 0
        for piece in pieces:
            if _source(piece) not in places:
                places[_source(piece)] = size
                size += -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT
        if len(self._memory) < size:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        staged, copied = [], set()
        for piece in pieces:
            source = _source(piece)
            begin = places[source]
            data = self._memory[begin : begin + piece.nbytes].view(piece.stored_dtype).view(piece.data.shape)
            if source not in copied:
                data.copy_(piece.data.detach(), non_blocking=True)
                copied.add(source)
            staged.append(replace(piece, data=data, dtype=None))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return staged


def _source(piece: Piece) -> tuple:
    """Equal for pieces that need one copy: float32 weights are the optimizer's main parameters."""
    return piece.data.data_ptr(), piece.data.shape, piece.data.stride(), piece.data.dtype, piece.stored_dtype


def _write(job: Job, group: dist.ProcessGroup | None, keep: retention.Keep) -> int:
    """Write a checkpoint together with all ranks of `group`; returns its bytes on rank 0 (0 elsewhere).

    Raises CheckpointError on all ranks when something fails on one.
    """
    rank, writes = dist.get_rank(), dist.get_rank() == 0
    sizes = _gather(sum(piece.nbytes for piece in job.pieces), group)
    fault = _fault(lambda: _begin(job, sum(sizes)), job)[0] if writes else None
    _raise_everywhere(fault, group)
    partial = folder.partial_folder(job.run_dir, job.step)
    fault, mine = _fault(lambda: PieceWriter(partial, rank).write(job.pieces, job.objects), job)
    reports: list[tuple[str | None, Written]] = _gather((fault, mine), group)
    if writes:
        fault = next((fault for fault, _ in reports if fault is not None), None)
        if fault is None:
            fault = _fault(lambda: _finish(job, partial, [written for _, written in reports], keep), job)[0]
        if fault is not None:
            folder.abandon(job.run_dir, job.step)
    _raise_everywhere(fault, group)
    return sum(sizes) if writes else 0


def _begin(job: Job, needed_bytes: int) -> None:
    lock.check_owned(job.run_dir)
    folder.begin(job.run_dir, job.step, needed_bytes)


def _finish(job: Job, partial: Path, written: list[Written], keep: retention.Keep) -> None:
    files = finish(partial, written, job.common)
    folder.finish(job.run_dir, job.step, files, job.metrics)
    retention.apply(job.run_dir, keep)


def _fault(action: object, job: Job) -> tuple[str | None, object]:
    """(None, what `action` returns), or (the sentence to stop with, None)."""
    try:
        return None, action()
    except CheckpointError as error:
        return str(error), None
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return (
            f"checkpoint.run_dir {job.run_dir}: the checkpoint after step {job.step} could not be written by rank "
            f"{dist.get_rank()} ({error.strerror or error}{where}); the one before it stays in force, repair the disk "
            "and start again"
        ), None


def _gather(value: object, group: dist.ProcessGroup | None) -> list:
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values or []


def _raise_everywhere(fault: str | None, group: dist.ProcessGroup | None) -> None:
    """Raise CheckpointError on all ranks when rank 0 has a fault."""
    outcome = [fault]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is not None:
        raise CheckpointError(outcome[0])
