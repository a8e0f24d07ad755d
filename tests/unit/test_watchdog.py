"""A hang is noticed, told and ended: by every rank alone, and by all together when one is stopped or behind."""

import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from megabagel.runtime import events, exit_codes, failure, watchdog
from megabagel.runtime.progress import Progress

PATIENCE = 120.0  # for a loaded machine; nothing here takes so long


def be_rank(rank: int, life: Callable[[int], None], environment: dict[str, str]) -> int:
    """A forked process that lives `life(rank)`; its id. It ends with 99 when nothing else ends it."""
    child = os.fork()
    if child == 0:
        os.environ |= environment | {"RANK": str(rank)}
        try:
            life(rank)
        finally:
            os._exit(99)
    return child


def ends(children: list[int]) -> list[int]:
    """Exit codes; all are killed after PATIENCE."""
    codes, deadline = {}, time.monotonic() + PATIENCE
    while len(codes) < len(children) and time.monotonic() < deadline:
        for child in set(children) - codes.keys():
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    for child in set(children) - codes.keys():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [codes.get(child, -1000) for child in children]


@pytest.fixture
def together():
    """Variables of three workers of one torchrun, whose store lives here."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "TORCHELASTIC_RUN_ID": "run",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_ERROR_FILE": os.devnull,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": "3",
    }


def test_a_process_that_does_not_get_on_ends_with_the_stacks_of_its_threads(tmp_path):
    def life(rank: int) -> None:
        progress = Progress()
        progress.mark(4, "in forward and backward")
        with watchdog.watching(tmp_path, 0.2, progress):
            time.sleep(PATIENCE)

    assert ends([be_rank(0, life, {})]) == [exit_codes.FAILED]
    (hang,) = [e for e in events.read(tmp_path) if e["kind"] == "hang"]
    assert hang["step"] == 5 and "this process is in forward and backward" in hang["message"]
    (stacks,) = (tmp_path / hang["file"]).iterdir()
    assert stacks.name == "rank_00000.txt" and "in life" in stacks.read_text()
    assert [e["reason"] for e in events.read(tmp_path) if e["kind"] == "end"] == ["failed"]


def test_a_process_that_gets_on_is_left_alone_and_long_phases_have_more_time(tmp_path):
    def life(rank: int) -> None:
        progress = Progress()
        with watchdog.watching(tmp_path, 4.0, progress):
            for step in range(8):
                progress.mark(step, "reading data")
                time.sleep(0.75)
        with watchdog.watching(tmp_path, None, progress):
            os._exit(7)

    assert ends([be_rank(0, life, {})]) == [7]
    dog = watchdog.Watchdog(tmp_path, 10.0, Progress(), None)
    progress = Progress()
    assert dog._limit(progress.now) == 40
    limits = []
    for step, phase in ((3, "reading data"), (3, "updating weights"), (4, "reading data"), (4, "saving")):
        progress.mark(step, phase)
        limits.append(dog._limit(progress.now))
    assert limits == [40, 40, 10, 40]  # the first step, the second, a save


def test_a_stopped_rank_is_named_and_ended_by_the_others(tmp_path, together):
    def life(rank: int) -> None:
        progress = Progress()
        with failure.guard(), watchdog.watching(tmp_path, 1.0, progress):
            for step in range(2):
                progress.mark(step, "reading data")
            time.sleep(0.5)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(PATIENCE)

    children = [be_rank(rank, life, together) for rank in range(3)]
    assert ends(children) == [exit_codes.FAILED, -signal.SIGKILL, exit_codes.FAILED]
    (hang,) = [e for e in events.read(tmp_path) if e["kind"] == "hang"]
    assert hang["ranks"] == [1] and "out of reach is rank 1 on" in hang["message"]
    assert {file.name for file in (tmp_path / hang["file"]).iterdir()} == {"rank_00000.txt", "rank_00002.txt"}


def test_a_stopped_rank_that_holds_the_store_is_named_and_ended_too(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "TORCHELASTIC_RUN_ID": "run",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_ERROR_FILE": os.devnull,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }

    def life(rank: int) -> None:
        progress = Progress()
        os.environ["LOCAL_RANK"] = str(rank)
        with failure.guard(), watchdog.watching(tmp_path, 1.0, progress):
            progress.mark(1, "reading data")
            time.sleep(2)
            if rank == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(PATIENCE)

    assert ends([be_rank(rank, life, variables) for rank in range(2)]) == [-signal.SIGKILL, exit_codes.FAILED]
    (hang,) = [e for e in events.read(tmp_path) if e["kind"] == "hang"]
    assert hang["ranks"] == [0] and "out of reach is rank 0 on" in hang["message"]
    assert [file.name for file in (tmp_path / hang["file"]).iterdir()] == ["rank_00001.txt"]


def test_the_rank_that_is_behind_is_named(tmp_path, together):
    def life(rank: int) -> None:
        progress = Progress()
        with failure.guard(), watchdog.watching(tmp_path, 1.0, progress):
            for phase in ("reading data", "encoding pictures", "in forward and backward")[: 2 if rank == 2 else 3]:
                progress.mark(6, phase)
            time.sleep(PATIENCE)

    children = [be_rank(rank, life, together) for rank in range(3)]
    assert ends(children) == [exit_codes.FAILED] * 3
    (hang,) = [e for e in events.read(tmp_path) if e["kind"] == "hang"]
    assert hang["ranks"] == [2] and "rank 2" in hang["message"] and "encoding pictures" in hang["message"]
    assert len(list((tmp_path / hang["file"]).iterdir())) == 3


def test_process_groups_wait_longer_than_the_watchdog():
    assert watchdog.group_timeout(None) == timedelta(minutes=30)
    assert watchdog.group_timeout(3600) > timedelta(seconds=watchdog.PATIENCE * 3600)
