"""One "node": torchrun's agent with its rendezvous, whose workers are forked instead of started, to save their imports.

Several on one machine stand for several nodes. What is forked must not have used threads of torch or a GPU before.
"""

import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megabagel.runtime import events

RUN = uuid.uuid4().hex


@dataclass(frozen=True)
class Job:
    """What all nodes have in common. `nodes`: fewest and most."""

    run_dir: str
    nodes: tuple[int, int]
    processes: int  # per node
    port: int
    max_restarts: int


def run(job: Job, node: int, log: str, target: Callable, *args: object) -> None:
    """Be node number `node`: call `target(*args)` on its ranks, again after a failure; exit with 1 after too many."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # a store per start, on rank 0: torch's agents else lend one that remembers the start before
    os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    config = LaunchConfig(
        min_nodes=job.nodes[0],
        max_nodes=job.nodes[1],
        nproc_per_node=job.processes,
        run_id=RUN,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{job.port}",
        rdzv_configs={"is_host": node == 0, "last_call_timeout": 5},
        max_restarts=job.max_restarts,
        local_addr="127.0.0.1",
        start_method="fork",
    )
    restart = LocalElasticAgent._restart_workers

    def note_and_restart(agent: LocalElasticAgent, group: object) -> None:
        events.record(job.run_dir, "noticed", node=node)
        restart(agent, group)

    with mock.patch.object(LocalElasticAgent, "_restart_workers", note_and_restart):
        try:
            elastic_launch(config, target)(*args)
        except ChildFailedError as error:
            sys.exit(str(error).splitlines()[0])
