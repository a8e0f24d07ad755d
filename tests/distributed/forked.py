"""Processes that start at once: forked from one process per test session that has imported what ranks need.

They find each other through the same variables and the same kind of store as under torchrun, whose start and imports
cost more than most tests. What torchrun itself does (end the others when one fails, explain) is not imitated.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = "tests.distributed.layouts.worker"
SETTLE_SECONDS = 5.0  # how long the other ranks may take to end after one has failed


def start_server() -> None:
    """Start the server unless it runs; it imports while the caller goes on."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([PRELOADED])
    forkserver.ensure_running()


def run(target: str, *args: str, processes: int, timeout: float) -> subprocess.CompletedProcess[str]:
    """`target`, a .py file or the dotted name of a module, as the main program of `processes` ranks.

    Returns the first exit code that is not 0, else 0, and in `stdout` both streams of all ranks as they came. All are
    ended soon after one has failed, and after `timeout` seconds; TimeoutError then carries the output so far.
    """
    start_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        output = Path(folder) / "output.txt"
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = [
            multiprocessing.get_context("forkserver").Process(
                target=_be_rank, args=(target, args, _environment(rank, processes, store.port, folder), str(output))
            )
            for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        in_time = _join(ranks, time.monotonic() + timeout)
        printed = output.read_text() if output.exists() else ""
    if not in_time:
        raise TimeoutError(f"{target} ran longer than {timeout} s; its output:\n{printed}")
    code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    return subprocess.CompletedProcess([target, *args], code, printed)


def _join(ranks: list[ForkServerProcess], deadline: float) -> bool:
    """Wait until all have ended, end the rest at the deadline; whether it was met."""
    running, failed = {rank.sentinel: rank for rank in ranks}, False
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            break
        for sentinel in ended:
            rank = running.pop(sentinel)
            rank.join()
            if rank.exitcode and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + SETTLE_SECONDS)
    for rank in running.values():
        rank.kill()
        rank.join()
    return failed or not running


def _environment(rank: int, processes: int, port: int, folder: str) -> dict[str, str]:
    """As torchrun sets it on one node, on top of this process's own."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    place |= {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    agent = {"RUN_ID": "forked", "RESTART_COUNT": 0, "MAX_RESTARTS": 0, "USE_AGENT_STORE": True}
    agent |= {"ERROR_FILE": f"{folder}/error{rank}.json"}
    variables = place | {f"TORCHELASTIC_{name}": value for name, value in agent.items()}
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", **{name: str(value) for name, value in variables.items()}}


def _be_rank(target: str, args: tuple[str, ...], environment: dict[str, str], output: str) -> None:
    """The life of a rank."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [target, *args]
    if target.endswith(".py"):
        sys.path.insert(0, os.path.dirname(target))  # as the interpreter does for a program
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
