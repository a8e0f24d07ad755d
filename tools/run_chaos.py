#!/usr/bin/env python
"""Train while ranks are killed and stopped at random, and compare with a run that was left alone.

Nodes are processes of this machine, each with torchrun's agent; their workers start again from the newest checkpoint
after every fault. A step may be poisoned: its data hold NaN, in both runs. Ends with JSON: how much of the time was
training, how long each fault took to be noticed and to be over, and whether the final state is the same to the bit.

    python tools/run_chaos.py --run-dir runs/chaos --kills 10 --stops 1 --poison 7 -- --config demo \\
        --training.train_steps 40 --checkpoint.save_interval 3 --parallel.tensor_model_parallel_size 2

CPUs only. The undisturbed run is written to RUN_DIR.undisturbed.
"""

import argparse
import json
import multiprocessing
import shutil
import socket
import sys
from pathlib import Path
from unittest import mock

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, when it is not installed

from megabagel import train
from megabagel.checkpoint import folder
from megabagel.config.load import load_config
from megabagel.config.schema import Config, ParallelConfig
from megabagel.runtime import distributed
from megabagel.training import attempts, metrics_file, setup  # noqa: F401  imported once, for all workers of all nodes
from tools.chaos import account, node, poison, strikes

_FORK = multiprocessing.get_context("fork")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="of the struck run; it is emptied first")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2, help="per node")
    parser.add_argument("--kills", type=int, default=10, help="SIGKILL to a rank, in any phase")
    parser.add_argument("--stops", type=int, default=1, help="SIGSTOP to a rank: the others have to notice")
    parser.add_argument("--steps", type=int, default=40, help="training.train_steps, over which the faults are spread")
    parser.add_argument("--hang-seconds", type=float, default=20.0, help="faults.hang_seconds")
    parser.add_argument("--poison", type=int, help="step whose data hold NaN")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which everything is ended")
    parser.add_argument("options", nargs="*", help="of megabagel.train, behind --")
    wanted = parser.parse_args(argv)
    ranks = wanted.nodes * wanted.processes
    faults = strikes.draw(wanted.seed, wanted.kills, wanted.stops, ranks, wanted.steps)
    undisturbed = wanted.run_dir.with_name(wanted.run_dir.name + ".undisturbed")
    for run_dir, struck_by in ((undisturbed, []), (wanted.run_dir, faults)):
        if not _train(run_dir, struck_by, wanted):
            print(
                f"error: the run in {run_dir} did not come to its end; see {run_dir}/chaos/node_*.log", file=sys.stderr
            )
            return 1
    different = _differences(wanted.run_dir, undisturbed, wanted.steps)
    report = {"bench": "chaos", **account.account(wanted.run_dir), "units": "seconds", "different": different}
    print(json.dumps(report, indent=1))
    return 1 if different else 0


def _train(run_dir: Path, faults: list[strikes.Strike], wanted: argparse.Namespace) -> bool:
    """Whether all nodes came to a good end."""
    shutil.rmtree(run_dir, ignore_errors=True)
    logs = run_dir / "chaos"
    logs.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # ranks on several nodes may fail one after the other, and each time counts on the node where it does
    job = node.Job(str(run_dir), (wanted.nodes, wanted.nodes), wanted.processes, port, 5 * len(faults))
    options = [
        *wanted.options,
        f"--checkpoint.run_dir={run_dir}",
        f"--training.train_steps={wanted.steps}",
        f"--faults.hang_seconds={wanted.hang_seconds}",
        "--faults.max_restarts_without_progress=null",
    ]
    config = load_config(options)
    nodes = [
        _FORK.Process(target=node.run, args=(job, n, str(logs / f"node_{n}.log"), _rank, faults, wanted.poison, config))
        for n in range(wanted.nodes)
    ]
    for process in nodes:
        process.start()
    for process in nodes:
        process.join(wanted.limit)
    in_time = [process.exitcode for process in nodes]
    for process in nodes:
        if process.is_alive():
            _end(process.pid)
    return in_time == [0] * len(nodes)


def _rank(faults: list[strikes.Strike], poisoned: int | None, config: Config) -> None:
    """The life of a worker. Its configuration was parsed before, once for all."""
    strikes.Striker(config.checkpoint.run_dir, faults).install()
    with mock.patch.object(train, "load_config", lambda argv: config):
        if poisoned is None:
            train.main([])
        else:
            sys.argv = ["poison", f"--step={poisoned}"]
            poison.main()


def _differences(run_dir: Path, other: Path, step: int) -> list[str]:
    """Names of tensors of the two final checkpoints, and of logged losses, that are not equal to the bit."""
    ours, theirs = _FORK.Pipe()
    child = _FORK.Process(target=_compare, args=(theirs, [folder.step_folder(d, step) for d in (run_dir, other)]))
    child.start()
    names = ours.recv()
    child.join()
    lines = [
        [(m["step"], m["ce"], m["mse"], m["grad_norm"]) for m in metrics_file.read_metrics(d)] for d in (run_dir, other)
    ]
    return names + (["metrics.jsonl"] if lines[0] != lines[1] else [])


def _compare(answer: multiprocessing.connection.Connection, folders: list[Path]) -> None:
    from megatron.core.dist_checkpointing import load_plain_tensors

    distributed.initialize(ParallelConfig(), 0)
    first, second = (
        {name: value for name, value in load_plain_tensors(str(path)).items() if isinstance(value, torch.Tensor)}
        for path in folders
    )
    names = first.keys() ^ second.keys()
    answer.send(sorted(names | {n for n in first.keys() & second.keys() if not torch.equal(first[n], second[n])}))
    distributed.destroy()


def _end(pid: int) -> None:
    """End a node with all its workers."""
    root = psutil.Process(pid)
    for process in [*root.children(recursive=True), root]:
        process.kill()


if __name__ == "__main__":
    sys.exit(main())
