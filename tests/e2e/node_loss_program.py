"""Program: trains on two "nodes" of one rank each and kills the second one, launcher and all, after a checkpoint.

    python tests/e2e/node_loss_program.py RUN_DIR [options of megabagel.train]

Exits non-zero unless the first node goes on alone and comes to the end.
"""

import multiprocessing
import socket
import sys
import time
from pathlib import Path
from unittest import mock

import psutil

from megabagel import train
from megabagel.config.load import load_config
from megabagel.config.schema import Config
from megabagel.runtime import events
from megabagel.training import attempts, setup  # noqa: F401  imported once, for the workers of both nodes
from tools.chaos import node

PATIENCE = 1200.0


def rank(config: Config) -> None:
    """The life of a worker; its configuration was parsed before."""
    with mock.patch.object(train, "load_config", lambda argv: config):
        train.main([])


def has_saved_together(run_dir: str) -> bool:
    """Whether there is a checkpoint of both nodes; one may have begun alone."""
    happened = events.read(run_dir)
    both = [e["time"] for e in happened if e["kind"] == "start" and e["world_size"] == 2]
    return bool(both) and any(e["kind"] == "save" and e["time"] > both[-1] for e in happened)


def main(run_dir: str, *options: str) -> int:
    config = load_config([*options, f"--checkpoint.run_dir={run_dir}"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = node.Job(run_dir, nodes=(1, 2), processes=1, port=port, max_restarts=3)
    fork = multiprocessing.get_context("fork")
    logs = [str(Path(run_dir).parent / f"node_{n}.log") for n in range(2)]
    nodes = [fork.Process(target=node.run, args=(job, n, logs[n], rank, config)) for n in range(2)]
    for process in nodes:
        process.start()
    deadline = time.monotonic() + PATIENCE
    while not has_saved_together(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    lost = psutil.Process(nodes[1].pid)
    for process in [*lost.children(recursive=True), lost]:
        process.kill()
    nodes[0].join(PATIENCE)
    return 0 if nodes[0].exitcode == 0 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
