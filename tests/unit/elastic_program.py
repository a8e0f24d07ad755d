"""A trainer reduced to its reader: each step's sample keys and the reader's state go to disk in one atomic rename.

Run as a program it serves requests, one JSON line {folder, size, workers, steps, then} on standard input each, so
that imports are paid for once. Each runs in a process of its own, forked, which is killed at the point it names.
"""

import contextlib
import hashlib
import itertools
import json
import os
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import numpy as np

from megabagel.config.datasets import load_dataset_groups
from megabagel.data.faults import FAULTS_FILE
from megabagel.data.pack import Pack
from megabagel.data.steps import EndOfData
from tests.unit.data_fixtures import make_reader
from tests.unit.reader_fixtures import GLOBAL_BATCH, Meeting, Replicas


@contextlib.contextmanager
def open_replicas(folder: Path, size: int, workers: int):
    """Readers of all replicas, in threads of this process, over the data.yaml beside `folder`."""
    groups, meeting = load_dataset_groups(str(folder.parent / "data.yaml")), Meeting(size)
    fields = {"packing": "balanced", "global_batch_size": GLOBAL_BATCH, "num_workers": workers}
    fields |= {"expected_num_tokens": 80, "max_num_tokens": 90, "max_num_tokens_per_sample": 80, "max_buffer_size": 6}
    fields["faults_file"] = folder / FAULTS_FILE
    with contextlib.ExitStack() as stack:
        readers = [
            stack.enter_context(
                make_reader(groups, rank, size, exchange=meeting.exchange(rank) if size > 1 else None, **fields)
            )
            for rank in range(size)
        ]
        yield Replicas(readers, meeting)


def digest(pack: Pack) -> str:
    """Of all bytes of a pack."""
    whole = hashlib.blake2b(digest_size=8)
    for field in fields(pack.plan):
        whole.update(repr(np.asarray(getattr(pack.plan, field.name)).tolist()).encode())
    for image in [*pack.vae_images, *pack.vit_images]:
        whole.update(repr(image.shape).encode() + image.numpy().tobytes())
    return whole.hexdigest() + repr((pack.groups, pack.keys, pack.origins))


def steps_of(folder: Path) -> list[Path]:
    """What was trained, in order."""
    return sorted(folder.glob("step_*.json"))


def train(folder: Path, size: int, workers: int) -> None:
    """Go on in `folder` up to the end of the data; the last state goes to end.json."""
    with open_replicas(folder, size, workers) as replicas:
        done = steps_of(folder)
        if done:
            replicas.load(json.loads(done[-1].read_text())["state"])
        with contextlib.suppress(EndOfData):
            for number in itertools.count(len(done)):
                packs = replicas.next_step()
                step = {"keys": [key for pack in packs for key in pack.keys], "packs": [digest(pack) for pack in packs]}
                put(folder / f"step_{number:05d}.json", step | {"state": replicas.state()})
        put(folder / "end.json", replicas.state())


def put(file: Path, content: dict) -> None:
    """Write the file in one go, whatever happens meanwhile."""
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content))
    os.replace(unfinished, file)


def serve() -> None:
    """Answers each request by a line: the exit code, or minus the signal that ended the process."""
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        begun = len(steps_of(folder))
        child = os.fork()
        if child == 0:
            run(folder, request)
        if request["steps"] is not None:
            while len(steps_of(folder)) < begun + request["steps"] and is_running(child):
                time.sleep(0.002)
            time.sleep(request["then"])
            os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(folder: Path, request: dict) -> NoReturn:
    """The trainer's process."""
    try:
        train(folder, request["size"], request["workers"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def is_running(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


if __name__ == "__main__":
    serve()
