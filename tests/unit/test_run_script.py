"""The run script's decisions at the end of an attempt, and what it asks of SLURM where containers are wanted."""

import runpy
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from megabagel.runtime import events

ROOT = Path(__file__).parents[2]
VERDICT = runpy.run_path(str(ROOT / "examples/lib/verdict.py"))
decide, main, START_AGAIN = VERDICT["decide"], VERDICT["main"], VERDICT["START_AGAIN"]


def requeue(step: int, reason: str) -> dict:
    return {"kind": "requeue", "step": step, "reason": reason}


@pytest.mark.parametrize(
    "code, asked, can_requeue, reason",
    [
        (75, "USR1", True, "stopped"),  # the time limit's signal
        (75, "", True, "stopped"),  # the ranks saw the time limit themselves
        (75, "USR1", False, None),
        (75, "TERM", True, None),  # scancel
        (75, "INT", False, None),
        (1, "", True, "failed"),
        (1, "", False, None),
        (1, "USR1", True, "stopped"),  # it had no time to save: no fault of the run
        (1, "TERM", True, None),
        (78, "", True, None),
        (78, "USR1", True, None),
    ],
)
def test_a_job_starts_again_only_where_that_helps(code, asked, can_requeue, reason):
    assert decide(code, asked, can_requeue, [], 40, 3)[0] == reason


def test_failures_without_a_new_checkpoint_come_to_an_end():
    failed = [requeue(40, "failed")] * 2
    assert decide(1, "", True, failed, 40, 3)[0] == "failed"
    assert decide(1, "", True, [*failed, requeue(40, "stopped"), requeue(40, "failed")], 40, 3)[0] is None
    assert decide(1, "", True, [*failed, *failed], 60, 3)[0] == "failed"  # there is a newer checkpoint
    assert "4 times in a row" in decide(1, "", True, [*failed, *failed[:1]], 40, 3)[1]


def test_the_failure_of_this_attempt_is_the_last_thing_said(tmp_path, capsys):
    events.record(tmp_path, "failure", message="rank 0: an old one")
    since = time.time()
    events.record(tmp_path, "failure", message="rank 3: the disk is full")
    assert main([str(tmp_path), "--since", str(since), "--logs", "run/logs/1.0"]) == 1
    out = capsys.readouterr().out
    assert "error: rank 3: the disk is full" in out and "run/logs/1.0" in out and "old" not in out


def test_a_job_that_starts_again_is_recorded(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    assert main([str(tmp_path), "--code", "75", "--asked", "USR1", "--can-requeue", "true"]) == START_AGAIN
    (event,) = events.read(tmp_path)
    assert (event["kind"], event["step"], event["reason"]) == ("requeue", 40, "stopped")


def test_steps_run_in_the_container_that_is_asked_for(tmp_path):
    """Stands in for SLURM with Pyxis: an srun that writes down its arguments."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in {
        "srun": f'printf "%s\\n" "$@" >{tmp_path}/srun',
        "scontrol": 'if [[ "$1 $2" == "show hostnames" ]]; then echo n1; else echo "NodeAddr=10.0.0.1 x"; fi',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    script = f"""set -euo pipefail; cd {ROOT}
        for part in environment cluster; do source examples/lib/$part.sh; done
        find_cluster; PYTHON=python3
        on_all_nodes {tmp_path}/logs 0 --nproc_per_node 8 -m megabagel.train; "${{step[@]}}" """
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "SLURM_JOB_ID": "1234",
        "SLURM_NNODES": "4",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "SLURM_JOB_END_TIME": "9",
        "CONTAINER_IMAGE": "/images/torch.sqsh",
        "CONTAINER_MOUNTS": "/data:/data",
        "MIN_NODES": "3",
    }
    subprocess.run([shutil.which("bash"), "-c", script], env=environment, check=True)
    arguments = (tmp_path / "srun").read_text().splitlines()
    assert "--container-image=/images/torch.sqsh" in arguments
    assert f"--container-mounts={ROOT}:{ROOT},/data:/data" in arguments
    assert arguments[: arguments.index("bash")].count("--no-kill") == 1
    after = arguments[arguments.index("bash") :]
    assert after[:4] == ["bash", "examples/lib/node.sh", f"{tmp_path}/logs", "python3"]
    assert after[after.index("--nnodes") + 1] == "3:4"
    assert after[after.index("--rdzv_endpoint") + 1] == "10.0.0.1:29734"
    assert after[-2:] == ["-m", "megabagel.train"]


@pytest.mark.parametrize("replicas, start", [("2", "DP=2 bash"), ("", "bash")])
def test_the_command_to_train_on_starts_as_many_replicas_as_the_run_had(tmp_path, replicas, start):
    script = f"""set -euo pipefail; cd {ROOT}
        say() {{ echo "$@"; }}; once() {{ echo curves; }}
        source examples/lib/results.sh
        is_demo=false; PYTHON=python3; steps=20; run_dir={tmp_path}; show_results"""
    environment = {"PATH": "/usr/bin:/bin", "DP": replicas}
    shown = subprocess.run([shutil.which("bash"), "-c", script], env=environment, check=True, capture_output=True)
    hints = [line.strip() for line in shown.stdout.decode().splitlines() if "--training.train_steps 40" in line]
    assert hints[0].startswith(f"{start} examples/run_finetune.sh --config {tmp_path}/config.yaml")
