"""One failure, one message: an exception on any rank ends all ranks within seconds, and that rank speaks last.

`with failure.guard(ConfigError, ...): main()` is all an entry point needs. Errors that a run survives go elsewhere.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megabagel.runtime import events, exit_codes

POLL_SECONDS = 1.0  # how often a healthy rank looks whether another one failed
HEARD_SECONDS = 3.0  # how long the failing rank waits for the others to fall silent before it speaks
LEAVE_SECONDS = 5.0  # how long a silenced rank waits for the launcher to end it before it leaves by itself
AGENT_SECONDS = 15.0  # how long a failed torchrun may take to end before its last line is left as it is
LAST_SECONDS = 60.0  # how long the rank that holds the store waits for the others to come to their end
_MEET = timedelta(minutes=10)  # until all ranks have imported what they need
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")


@dataclass
class Guarded:
    """What the body of `guard` may tell: where failures are recorded as events, once that is known."""

    run_dir: str | Path | None = None


@contextlib.contextmanager
def guard(*expected: type[BaseException], hopeless: tuple[type[BaseException], ...] = ()) -> Iterator[Guarded]:
    """Run the body; an exception in it on any rank ends every rank with a non-zero exit code.

    The failing rank prints `rank 3: <sentence>`: for the `expected` types the sentence alone, for anything else the
    traceback above it. The others fall silent first. The ranks find each other through a store that torchrun has
    prepared; a process that torchrun did not start prints its own message and ends alone. `hopeless`: types after which
    nobody should start again; the exit code says so.
    """
    store, guarded, done = shared_store("failure"), Guarded(), threading.Event()
    if store is not None:
        threading.Thread(target=_watch, args=(store.clone(), done), name="failure-watch", daemon=True).start()
    try:
        yield guarded
    except KeyboardInterrupt:
        leave(128 + signal.SIGINT)
    except SystemExit:  # asked for, as by --help
        raise
    except BaseException as error:  # torch has errors that are not Exceptions
        done.set()
        sentence = str(error) if isinstance(error, expected) else f"{type(error).__name__}: {error}"
        details = "" if isinstance(error, expected) else "".join(traceback.format_exception(error))
        if store is not None and details and any(text in str(error) for text in _LOST_PEER):
            time.sleep(2 * POLL_SECONDS)  # a peer has gone: what it has to say, or torchrun about it, comes first
        code = exit_codes.GIVE_UP if isinstance(error, hopeless) else exit_codes.FAILED
        end(sentence, store, details=details, code=code, run_dir=guarded.run_dir)
    finally:
        done.set()
    if store is not None:
        _last_out(store)


def end(
    sentence: str, store: dist.Store | None, *, details: str = "", code: int = 1, run_dir: str | Path | None = None
) -> None:
    """Claim the failure, wait until the other ranks are silent, say what happened, and end this process.

    `store`: `shared_store("failure")`. From any thread. What this rank says is recorded in the events of `run_dir`.
    """
    if store is not None:
        if store.add("failed", 1) > 1:
            _fall_silent(store)
        deadline = time.monotonic() + HEARD_SECONDS
        others = int(os.environ["WORLD_SIZE"]) - 1
        while store.add("silent", 0) < others and time.monotonic() < deadline:
            time.sleep(0.05)
    message = f"rank {os.environ.get('RANK', '0')}: {sentence}"
    sys.stdout.flush()
    print(details + message, file=sys.stderr, flush=True)
    if run_dir is not None:
        with contextlib.suppress(OSError):
            reason = "give_up" if code == exit_codes.GIVE_UP else "failed"
            events.record(run_dir, "failure", message=message)
            events.record(run_dir, "end", step=None, reason=reason, saved=False, message=message)
    if _under_torchrun():
        _tell_torchrun(message)
        _repeat_after_torchrun(message)
    leave(code)


def _tell_torchrun(message: str) -> None:
    """Make `message` the root cause in the summary that torchrun prints."""
    details = {"py_callstack": message, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(
            json.dumps({"message": {"message": message, "extraInfo": details}})
        )


def _repeat_after_torchrun(message: str) -> None:
    """Say `message` once more below torchrun's own fifty lines: a small process waits for torchrun's end to do so."""
    if not hasattr(os, "pidfd_open"):  # only Linux can wait for a process that is not its child
        return
    program = (
        "import select, sys\n"
        "if select.select([int(sys.argv[1])], [], [], float(sys.argv[2]))[0]:\n"
        "    sys.exit(sys.argv[3])  # prints it"
    )
    with contextlib.suppress(OSError):
        agent = os.pidfd_open(os.getppid())
        command = [sys.executable, "-S", "-c", program, str(agent), str(AGENT_SECONDS), message]
        subprocess.Popen(command, start_new_session=True, pass_fds=[agent])


def _watch(store: dist.Store, done: threading.Event) -> None:
    """Fall silent when another rank has failed or the launcher has gone, then leave. The main thread may be stuck in a
    collective meanwhile."""
    launcher = os.getppid()
    while not done.wait(POLL_SECONDS):
        try:
            failed = store.check(["failed"]) or os.getppid() != launcher
        except dist.DistError:  # whoever held the store has gone, and with it the run
            failed = True
        if failed and not done.is_set():
            _fall_silent(store)


def _last_out(store: dist.Store) -> None:
    """Come to the end together: the store may live in this process, and the others look into it until they end."""
    with contextlib.suppress(dist.DistError):
        arrived = store.add("ended", 1)
        deadline = time.monotonic() + LAST_SECONDS
        while _holds_store() and arrived < int(os.environ["WORLD_SIZE"]) and time.monotonic() < deadline:
            time.sleep(0.05)
            arrived = store.add("ended", 0)


def shared_store(prefix: str) -> dist.Store | None:
    """A client of the store that all workers of this start share, below `prefix`; None without torchrun or peers.

    The store of torchrun's agent if it lends it, else one of rank 0. The agent's outlives its workers, so what one
    start has written is kept from the next.
    """
    if not _under_torchrun() or os.environ["WORLD_SIZE"] == "1":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, None, _holds_store(), _MEET, wait_for_workers=False, multi_tenant=True)
    is_lent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    start = os.environ["TORCHELASTIC_RESTART_COUNT"] if is_lent else "only"
    return dist.PrefixStore(f"megabagel/{start}/{prefix}", store)


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _holds_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and os.environ["RANK"] == "0"


def _fall_silent(store: dist.Store) -> None:
    """Say nothing more, tell the failing rank so, and wait for the launcher to end this process."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    with contextlib.suppress(dist.DistError):
        store.add("silent", 1)
    time.sleep(LEAVE_SECONDS)
    leave(exit_codes.FAILED)


def leave(code: int) -> None:
    """End this process without the interpreter's shutdown, which could wait for a collective; data workers go first."""
    for child in multiprocessing.active_children():
        child.kill()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
