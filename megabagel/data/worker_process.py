"""One worker process: what runs in it, and the handle by which the trainer talks to it.

Which tasks it gets, and what happens when it fails, is decided in `workers.py`.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
from queue import SimpleQueue
from typing import Any

import pyarrow
import torch

from megabagel.data import messages
from megabagel.data.faults import DataError

_starting = threading.Lock()  # multiprocessing keeps its children in a set that is not guarded


class WorkerProcess:
    """A process that was started; the first answer it gives means that it is ready."""

    def __init__(self, maker: Any) -> None:
        """`maker`: picklable, its methods are the tasks. Raises OSError or EOFError where no process can be started."""
        # Not fork: the trainer has threads and perhaps a GPU. The fork server imports once for all workers.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([type(maker).__module__, __name__, *_main_module()])
        self._channel, theirs = socket.socketpair()
        try:
            self._process = context.Process(target=_work, args=(theirs,), daemon=True)
            with _starting:
                self._process.start()
        except BaseException:
            self._channel.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        self._maker = maker

    def begin(self, seconds: float) -> None:
        """Hand over the maker and wait until the worker is ready. Raises like `receive`, and DataError."""
        self._channel.settimeout(seconds)
        messages.send(self._channel, self._maker)
        good, error = self.receive(seconds)
        if not good:
            raise error

    def send(self, kind: str, arguments: tuple, seconds: float) -> None:
        """Raises OSError when the worker is gone and TimeoutError when it takes nothing for `seconds`."""
        self._channel.settimeout(seconds)
        messages.send(self._channel, (kind, arguments))

    def receive(self, seconds: float) -> tuple[bool, Any]:
        """The next answer: (True, result) or (False, exception). Raises EOFError, OSError, TimeoutError."""
        self._channel.settimeout(seconds)
        return messages.receive(self._channel)

    def hang_up(self) -> None:
        """Wake whoever waits for an answer; the worker ends by itself."""
        try:
            self._channel.shutdown(socket.SHUT_RDWR)
        except OSError:  # it has hung up already
            return

    def kill(self) -> None:
        """End the process, also a stopped one, and wait for its end."""
        self._process.kill()
        self._process.join()
        self._channel.close()


def _main_module() -> list[str]:
    """The program, if it was started with -m: workers import it, so the fork server should do that once for all."""
    spec = sys.modules["__main__"].__spec__
    return [] if spec is None or spec.name.endswith("__main__") else [spec.name]


def _work(channel: socket.socket) -> None:
    """The life of a worker."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # they reach the whole group
        signal.signal(number, signal.SIG_IGN)  # the trainer decides when it ends, and with it this process
    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    try:
        maker = messages.receive(channel)
    except (EOFError, OSError):
        return
    except Exception:
        messages.send(channel, (False, _failure()))
        return
    messages.send(channel, (True, None))
    tasks: SimpleQueue = SimpleQueue()
    threading.Thread(target=_listen, args=(channel, tasks), daemon=True).start()
    while True:
        kind, arguments = tasks.get()
        answer = _do(maker, kind, arguments)
        try:
            messages.send(channel, answer)
        except OSError:
            os._exit(1)
        except Exception:  # it cannot be pickled
            messages.send(channel, (False, _failure()))


def _listen(channel: socket.socket, tasks: SimpleQueue) -> None:
    """Take tasks at once, so that neither side ever waits for the other to read, and die with the trainer: a killed
    trainer cannot stop its workers."""
    try:
        while True:
            tasks.put(messages.receive(channel))
    except BaseException:
        os._exit(1)


def _do(maker: Any, kind: str, arguments: tuple) -> tuple[bool, Any]:
    try:
        return True, getattr(maker, kind)(*arguments)
    except MemoryError:
        os._exit(1)  # a new process starts with free memory, and the task is not tried for ever
    except Exception:
        return False, _failure()


def _failure() -> Exception:
    """What is raised right now in a form that any process can unpickle."""
    error = sys.exc_info()[1]
    if isinstance(error, DataError):
        return DataError(str(error))
    return RuntimeError(f"a data worker failed:\n{traceback.format_exc()}")
