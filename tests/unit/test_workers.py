"""The worker pool: the same results whatever happens to its processes, and nothing left behind."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megabagel.data.faults import DataError, Fault
from megabagel.data.workers import open_pool


@dataclass
class Counting:
    """Tasks whose results say what was asked for, some of which end their process."""

    folder: str | None = None  # notes of workers: a file named like the process id, a byte for each task
    broken_start: bool = False

    def __setstate__(self, state: dict) -> None:
        if state["broken_start"]:
            os._exit(1)
        self.__dict__.update(state)

    def note(self) -> None:
        if self.folder:
            with Path(self.folder, str(os.getpid())).open("ab") as file:
                file.write(b".")

    def measure(self, group: int, position: int) -> tuple:
        self.note()
        return "measured", group, position

    def load(self, group: int, position: int, action: str = "picture"):
        if action == "picture":
            self.note()
            time.sleep(0.005)
            return pictures(group, position)
        if action == "raise":
            raise KeyError(position)
        if action == "unpicklable":
            return threading.Lock()
        if action == "no memory":
            raise MemoryError
        os.kill(os.getpid(), {"die": signal.SIGKILL, "stop": signal.SIGSTOP}[action])

    def origin(self, group: int, position: int) -> str:
        return f"group {group}, row {position}"


def pictures(group: int, position: int) -> dict:
    draw = np.random.default_rng([group, position])
    height, width = 14 * draw.integers(1, 20, 2)
    picture = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return {
        "vit": [picture, picture[:, ::-1]],
        "latents": [draw.random((32, height, 8), dtype=np.float32)],
        "at": position,
    }


def same(ours: dict, theirs: dict) -> bool:
    lists = all(
        len(ours[name]) == len(theirs[name])
        and all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(ours[name], theirs[name], strict=True))
        for name in ("vit", "latents")
    )
    return lists and ours["at"] == theirs["at"]


@pytest.fixture
def open_(request):
    """Opens pools that are closed at the end of the test."""
    pools = []

    def opened(maker: Counting, workers: int = 2, **options):
        pools.append(open_pool(maker, workers, **options))
        return pools[-1]

    yield opened
    for pool in pools:
        pool.close()


def worker_ids(folder: Path, tasks: int = 1) -> list[int]:
    """Living workers that began so many tasks."""
    files = [file for file in folder.iterdir() if file.stat().st_size >= tasks]
    return [int(file.name) for file in files if Path("/proc", file.name).exists()]


@pytest.mark.parametrize("workers", [0, 2])
def test_results_are_those_of_the_maker(open_, workers):
    pool = open_(Counting(), workers)
    loads = [pool.submit("load", 1, position) for position in range(12)]
    measured = [pool.submit("measure", 2, position) for position in range(12)]
    assert [future.result() for future in measured] == [("measured", 2, position) for position in range(12)]
    assert all(same(future.result(), pictures(1, position)) for position, future in enumerate(loads))
    with pytest.raises((KeyError, RuntimeError), match="7"):
        pool.submit("load", 0, 7, "raise").result()
    assert pool.submit("measure", 0, 1).result() == ("measured", 0, 1)


def test_pictures_lie_plane_by_plane_in_shared_memory_that_they_keep_alive(open_):
    result = open_(Counting(), 1).submit("load", 0, 3).result()
    picture = result["vit"][0]
    assert picture.transpose(2, 0, 1).flags.c_contiguous and picture.flags.writeable
    before = maps()
    assert before > 0
    del result
    assert maps() == before and np.array_equal(picture, pictures(0, 3)["vit"][0])
    del picture
    assert maps() < before


def maps() -> int:
    """Segments of workers that are mapped here."""
    return Path("/proc/self/maps").read_text().count("memfd:pictures")


def test_waiting_results_hold_no_descriptors(open_):
    pool = open_(Counting(), 2)
    futures = [pool.submit("load", 0, position) for position in range(60)]
    results = [future.result() for future in futures]
    names = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert len(results) == 60 and not any("memfd:pictures" in name for name in names)


def test_all_results_arrive_though_workers_are_killed_and_stopped(open_, tmp_path):
    pool = open_(Counting(str(tmp_path)), 2, hang_seconds=0.7)
    futures = []
    for position in range(300):
        futures += [pool.submit("measure", 0, position), pool.submit("load", 0, position)]
    draw, attacked = random.Random(5), []
    while not all(future.done() for future in futures):
        time.sleep(draw.uniform(0.02, 0.1))
        targets = set(worker_ids(tmp_path, tasks=4)) - set(attacked)  # what killed their forerunners is done again
        if len(attacked) < 7 and targets:
            attacked.append(draw.choice(sorted(targets)))
            os.kill(attacked[-1], signal.SIGSTOP if len(attacked) % 3 == 2 else signal.SIGKILL)
    assert len(attacked) == 7
    for position in range(300):
        assert futures[2 * position].result() == ("measured", 0, position)
        assert same(futures[2 * position + 1].result(), pictures(0, position))
    del futures
    assert maps() == 0  # the memory goes with the last result


@pytest.mark.parametrize(
    ("action", "reason"), [("die", "died"), ("stop", "did not answer for 0.4 s"), ("no memory", "died")]
)
def test_a_task_that_ends_two_workers_becomes_a_fault(open_, action, reason):
    pool = open_(Counting(), 1, hang_seconds=0.4)
    before, bad, after = pool.submit("load", 0, 1), pool.submit("load", 4, 2, action), pool.submit("load", 0, 3)
    fault = bad.result()
    assert isinstance(fault, Fault) and (fault.kind, fault.origin) == ("worker_died", "group 4, row 2")
    assert reason in fault.message and "load" in fault.message
    assert same(before.result(), pictures(0, 1)) and same(after.result(), pictures(0, 3))


def test_workers_that_cannot_start_end_the_pool_with_what_to_do(open_):
    pool = open_(Counting(broken_start=True), 2)
    with pytest.raises(DataError, match="lack of host memory: lower data.num_workers"):
        pool.submit("load", 0, 0).result(timeout=60)
    with pytest.raises(DataError, match="lack of host memory: lower data.num_workers"):
        pool.submit("load", 0, 0).result(timeout=60)


def test_a_result_that_cannot_travel_is_an_error_of_that_task_only(open_):
    pool = open_(Counting(), 1)
    with pytest.raises(RuntimeError, match="lock"):
        pool.submit("load", 0, 0, "unpicklable").result()
    assert pool.submit("measure", 0, 0).result() == ("measured", 0, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_cancelled_tasks_are_not_done(open_, workers):
    pool = open_(Counting(), workers)
    futures = [pool.submit("load", 0, 2, "stop" if workers == 0 else "picture") for _ in range(50)]
    assert futures[-1].cancel()
    with pytest.raises(CancelledError):
        futures[-1].result()


def test_measuring_goes_before_loading(open_):
    pool = open_(Counting(), 1)
    pool.submit("measure", 0, 0).result()
    loads = [pool.submit("load", 0, position) for position in range(200)]
    pool.submit("measure", 0, 1).result()
    assert not loads[-1].done()


def test_closing_ends_workers_and_waiting_tasks(open_, tmp_path):
    pool = open_(Counting(str(tmp_path)), 2)
    pool.submit("measure", 0, 0).result()
    futures = [pool.submit("load", 0, 0, "stop")] + [pool.submit("load", 0, position) for position in range(500)]
    pool.close()
    assert not worker_ids(tmp_path)
    assert all(future.done() for future in futures)
    with pytest.raises(CancelledError):
        pool.submit("measure", 0, 0).result()


TRAINER = """
import sys
from tests.unit.test_workers import Counting
from megabagel.data.workers import open_pool
if __name__ == "__main__":
    pool = open_pool(Counting(sys.argv[1]), 2)
    futures = [pool.submit("measure", 0, position) for position in range(50)]
    print([future.result() for future in futures][-1], flush=True)
    futures = [pool.submit("load", 0, position) for position in range(10**5)]
    futures[-1].result()
"""


def test_workers_end_with_a_killed_trainer(tmp_path):
    (tmp_path / "pids").mkdir()
    program = tmp_path / "trainer.py"
    program.write_text(TRAINER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(program), str(tmp_path / "pids")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout.readline() == "('measured', 0, 49)\n"
        workers = worker_ids(tmp_path / "pids")
        assert workers
        trainer.kill()
    deadline = time.monotonic() + 20
    while worker_ids(tmp_path / "pids") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker_ids(tmp_path / "pids")
