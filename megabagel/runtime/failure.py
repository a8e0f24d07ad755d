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
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

POLL_SECONDS = 1.0  # how often a healthy rank looks whether another one failed
HEARD_SECONDS = 3.0  # how long the failing rank waits for the others to fall silent before it speaks
LEAVE_SECONDS = 5.0  # how long a silenced rank waits for the launcher to end it before it leaves by itself
AGENT_SECONDS = 15.0  # how long a failed torchrun may take to end before its last line is left as it is
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")


@contextlib.contextmanager
def guard(*expected: type[BaseException]) -> Iterator[None]:
    """Run the body; an exception in it on any rank ends every rank with a non-zero exit code.

    The failing rank prints `rank 3: <sentence>`: for the `expected` types the sentence alone, for anything else the
    traceback above it. The others fall silent first. The ranks find each other through the store of torchrun's agent; a
    process that torchrun did not start prints its own message and ends alone.
    """
    store = _agent_store()
    done = threading.Event()
    if store is not None:
        threading.Thread(target=_watch, args=(store.clone(), done), name="failure-watch", daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except SystemExit:  # asked for, as by --help
        raise
    except BaseException as error:  # torch has errors that are not Exceptions
        done.set()
        _fail(error, isinstance(error, expected), store)
    finally:
        done.set()


def _fail(error: BaseException, is_expected: bool, store: dist.Store | None) -> None:
    """Claim the failure, wait until the other ranks are silent, say what happened, and end this process."""
    if store is not None:
        if not is_expected and any(text in str(error) for text in _LOST_PEER):
            time.sleep(2 * POLL_SECONDS)  # a peer has gone: what it has to say, or torchrun about it, comes first
        if store.add("failed", 1) > 1:
            _fall_silent(store)
        deadline = time.monotonic() + HEARD_SECONDS
        others = int(os.environ["WORLD_SIZE"]) - 1
        while store.add("silent", 0) < others and time.monotonic() < deadline:
            time.sleep(0.05)
    sentence = str(error) if is_expected else f"{type(error).__name__}: {error}"
    message = f"rank {os.environ.get('RANK', '0')}: {sentence}"
    details = "" if is_expected else "".join(traceback.format_exception(error))
    sys.stdout.flush()
    print(details + message, file=sys.stderr, flush=True)
    if _under_torchrun():
        _tell_torchrun(message)
        _repeat_after_torchrun(message)
    _leave(1)


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
    """Fall silent when another rank has failed, then leave. The main thread may be stuck in a collective meanwhile."""
    while not done.wait(POLL_SECONDS):
        try:
            failed = store.check(["failed"])
        except dist.DistError:  # the agent has gone, and with it the run
            failed = True
        if failed and not done.is_set():
            _fall_silent(store)


def _agent_store() -> dist.Store | None:
    """The store of torchrun's agent under a prefix of this start of the workers; None without torchrun or peers."""
    if not _under_torchrun() or os.environ["WORLD_SIZE"] == "1":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))
    return dist.PrefixStore(f"megabagel/failure/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _under_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _fall_silent(store: dist.Store) -> None:
    """Say nothing more, tell the failing rank so, and wait for the launcher to end this process."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    with contextlib.suppress(dist.DistError):
        store.add("silent", 1)
    time.sleep(LEAVE_SECONDS)
    _leave(1)


def _leave(code: int) -> None:
    """End without the interpreter's shutdown, which could wait for a collective; data workers go first."""
    for child in multiprocessing.active_children():
        child.kill()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
