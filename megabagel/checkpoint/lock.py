"""One job per run folder: a lock file with a heartbeat. A second job is refused; that of a dead owner is taken over.

It protects against mistakes on shared file systems without a lock service; it needs exclusive creation and renames.
"""

import contextlib
import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch.distributed as dist

from megabagel.checkpoint import folder
from megabagel.checkpoint.errors import CheckpointError

logger = logging.getLogger(__name__)

LOCK = "run.lock"
BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0  # without a beat for so long, an owner of whom nothing else is known is taken for dead
END_SECONDS = 5.0  # an owner that lives may be on its way out, as after a kill of its launcher
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Owner:
    """Who holds a run folder. `boot` and `namespace` tell whether `pid` and `started` mean anything to another process.

    `job` and `restart`: SLURM's job id and how often it requeued the job. `since`: UTC, ISO 8601. `run`: torchrun's
    name of the workers that it starts and starts again.
    """

    token: str
    host: str
    pid: int
    started: str  # in clock ticks after boot
    boot: str
    namespace: str  # of process ids
    job: str
    restart: int
    since: str
    run: str = ""

    @classmethod
    def me(cls) -> "Owner":
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            boot=_boot(),
            namespace=_namespace(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            run=os.environ.get("TORCHELASTIC_RUN_ID", ""),
        )

    @property
    def process(self) -> tuple[str, str, int, str]:
        return self.boot, self.namespace, self.pid, self.started

    def is_running(self) -> bool | None:
        """Whether the owner lives; None where that cannot be known from here."""
        me = Owner.me()
        if self.job and self.job == me.job and self.restart < me.restart:
            return False  # SLURM has ended it before it started the job again
        if self.boot and self.process[:2] == me.process[:2]:
            return _start_of(self.pid) == self.started
        if self.job and (self.job, self.run) == (me.job, me.run):
            return False  # torchrun starts workers again when the old ones, or the machine that they were on, are gone
        return None

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


@contextlib.contextmanager
def own(run_dir: str | Path, rank: int) -> Iterator[None]:
    """Hold `run_dir` for this job while the body runs, on all its ranks; what kills left there is cleared away.

    Raises CheckpointError when another job holds the folder, or when a machine's first rank cannot write there. An
    owner of whom nothing else can be known has DEAD_SECONDS to show a beat.
    """
    run_dir = Path(run_dir)
    if rank == 0 or os.environ.get("LOCAL_RANK", "0") == "0":
        check_writable(run_dir)
    with _held(run_dir) if rank == 0 else contextlib.nullcontext():
        if dist.is_initialized():
            dist.barrier()  # no rank touches the folder before it is known to be free
        yield


def check_owned(run_dir: str | Path) -> None:
    """Raise CheckpointError when another job has taken `run_dir` over, as it may while this one was stopped."""
    try:
        owner, _ = _read(Path(run_dir) / LOCK)
    except OSError:  # nobody locks this folder
        return
    if owner is not None and owner.process != Owner.me().process:
        raise _refusal(run_dir, owner)


def check_writable(run_dir: str | Path) -> None:
    """Raise CheckpointError when no file can be written below `run_dir`, which is made if need be."""
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(run_dir, error) from None


@contextlib.contextmanager
def _held(run_dir: Path) -> Iterator[None]:
    lock, me = run_dir / LOCK, Owner.me()
    try:
        _acquire(lock, me)
        folder.settle(run_dir)
    except OSError as error:
        raise _unwritable(run_dir, error) from None
    done = threading.Event()
    threading.Thread(target=_beat, args=(lock, me, done), name="run-lock", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        with contextlib.suppress(OSError):
            if _read(lock)[0] == me:
                lock.unlink()


def _acquire(lock: Path, me: Owner) -> None:
    """Create `lock` for `me`, in place of a dead owner's if need be. Raises CheckpointError when its owner lives.

    Several jobs may find the same dead owner. The one that holds the lock named after that owner replaces it, and looks
    again before: another may have been faster. Such a lock may itself be left by a job that died, hence the recursion.
    """
    while not _create(lock, me):
        with contextlib.suppress(FileNotFoundError):  # released in this moment
            owner, beat = _read(lock)
            if _lives(lock, owner, beat):
                raise _refusal(lock.parent, _read(lock)[0])
            claim = lock.with_name(f"{LOCK}.{owner.token if owner else 'unnamed'}")
            _acquire(claim, me)
            if _replace(lock, owner, claim):
                ended = "%s was locked by %s, which has ended; its lock is taken over."
                logger.warning(ended, lock.parent, owner or "a job")
                return


def _replace(lock: Path, owner: Owner | None, claim: Path) -> bool:
    """Put `claim` in the place of `lock` if that is still `owner`'s, else remove the claim."""
    try:
        if _read(lock)[0] == owner:
            os.replace(claim, lock)
            return True
    except FileNotFoundError:
        pass
    claim.unlink()
    return False


def _lives(lock: Path, owner: Owner | None, beat: float) -> bool:
    """Whether the owner is alive; waits for its end, or for a beat where nothing else tells."""
    running = owner.is_running() if owner else None
    deadline = time.monotonic() + END_SECONDS
    while running and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        running = owner.is_running()
    if running is not None:
        return running
    remaining = DEAD_SECONDS - max(0.0, _now_at(lock.parent) - beat)
    if remaining > 0:
        logger.warning("%s is locked by %s; waiting whether it gives a sign of life.", lock.parent, owner or "a job")
    deadline = time.monotonic() + remaining
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        if _read(lock) != (owner, beat):
            return True
    return False


def _create(lock: Path, me: Owner) -> bool:
    try:
        with lock.open("x") as file:
            json.dump(asdict(me), file)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _read(lock: Path) -> tuple[Owner | None, float]:
    """The owner (None while it writes its name) and when it last gave a sign of life, by the file server's clock."""
    with lock.open() as file:  # opening asks the server, where looking at the path may ask a cache
        beat = os.fstat(file.fileno()).st_mtime
        text = file.read()
    try:
        return Owner(**json.loads(text)), beat
    except (ValueError, TypeError):
        return None, beat


def _beat(lock: Path, me: Owner, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # a file server that is away for a moment
            if _read(lock)[0] == me:
                os.utime(lock)


def _now_at(folder_: Path) -> float:
    """The file server's clock."""
    with tempfile.TemporaryFile(dir=folder_) as file:
        file.write(b".")
        file.flush()
        return os.fstat(file.fileno()).st_mtime


def _start_of(pid: int) -> str:
    """When process `pid` started; empty when it has ended, or where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _boot() -> str:
    """Of the running kernel; empty where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _refusal(run_dir: Path, owner: Owner | None) -> CheckpointError:
    return CheckpointError(
        f"checkpoint.run_dir {run_dir} is in use by another job ({owner or 'which is just starting'}); stop that one "
        "or choose another folder"
    )


def _unwritable(run_dir: str | Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"checkpoint.run_dir {run_dir} cannot be written ({error.strerror}); make it writable or choose another folder"
    )
