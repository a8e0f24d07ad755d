"""The run script on a real SLURM of two nodes: it trains across them and survives what clusters do to jobs."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megabagel.runtime import events
from tests.slurm.cluster import Cluster, missing
from tests.tiny_data import training_options, write_data

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/run_finetune.sh"
STEPS = 60
SOON = 30  # seconds within which a fault has to be told
LATER = 1200  # seconds: a loaded machine trains slowly
VALUES = ("ce", "mse", "grad_norm", "lr", "samples_seen")

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=f"SLURM is not installed: there is no {missing()}"),
    pytest.mark.timeout(3 * LATER),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as home:  # short: it holds a socket
        cluster = Cluster(Path(home))
        cluster.environment |= {"MEGABAGEL_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "DP": "2"}
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def submit(cluster: Cluster, data: Path, run_dir: Path, *options: str, preflight: bool = False) -> str:
    """The id of a job that runs the script; what it prints goes to RUN_DIR.out."""
    config = data.parent / "empty.yaml"
    config.write_text("{}\n")
    arguments = [*training_options(data, run_dir, STEPS), "--checkpoint.save_interval=20", *options]
    return cluster.submit(
        "--nodes=2",
        f"--output={run_dir}.out",
        f"--export=ALL,PREFLIGHT={int(preflight)}",
        *(str(SCRIPT), "--config", str(config), *arguments),
        cwd=data.parent,
    )


def steps_of(run_dir: Path) -> dict[int, dict]:
    """What metrics.jsonl holds, by step."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return {record["step"]: record for record in map(json.loads, (line for line in lines if line.endswith("\n")))}


def wait_for_steps(cluster: Cluster, job: str, run_dir: Path, more: int) -> None:
    """Until `more` steps were trained than the run folder knows of now, by a job that still trains."""
    target = max(steps_of(run_dir), default=0) + more
    assert target < STEPS, "nothing is left to disturb"
    cluster.wait(lambda: max(steps_of(run_dir), default=0) >= target, LATER, f"step {target} of job {job}")


def said(run_dir: Path) -> str:
    return Path(f"{run_dir}.out").read_text()


def kinds(run_dir: Path, kind: str) -> list[dict]:
    return [event for event in events.read(run_dir) if event["kind"] == kind]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, data: Path) -> Path:
    """The run folder of a job that nothing happened to."""
    run_dir = data.parent / "undisturbed"
    job = submit(cluster, data, run_dir, preflight=True)
    ended = cluster.wait_for_end(job, LATER)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), said(run_dir)
    return run_dir


def test_a_job_trains_across_both_nodes(undisturbed):
    assert list(steps_of(undisturbed)) == list(range(1, STEPS + 1))
    (attempt,) = (undisturbed / "logs").iterdir()
    for part in (attempt, attempt / "preflight"):
        for node in ("node1", "node2"):
            assert len(list((part / node).glob("*/attempt_0/0/stderr.log"))) == 1
    (check,) = kinds(undisturbed, "preflight")
    assert (check["nodes"], check["ranks"], check["faults"]) == (2, 2, [])
    assert "loss curves" in said(undisturbed)


def test_a_run_survives_scancel_a_request_to_stop_and_a_lost_node(cluster, data, undisturbed):
    run_dir = data.parent / "disturbed"
    job = submit(cluster, data, run_dir)
    wait_for_steps(cluster, job, run_dir, 3)
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job, LATER)["JobState"] == "CANCELLED"
    cluster.wait(lambda: "asked to end" in said(run_dir), LATER, "the cancelled job has said its last")
    saved = max(steps_of(run_dir))
    assert int((run_dir / "latest_checkpointed_iteration.txt").read_text()) == saved, said(run_dir)
    assert not kinds(run_dir, "requeue")
    cluster.wait(lambda: not cluster.run("squeue", "--noheader"), LATER, "no job runs")

    job = submit(cluster, data, run_dir)
    wait_for_steps(cluster, job, run_dir, 3)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 does before the time limit
    cluster.wait(lambda: cluster.job(job).get("Restarts") == "1", LATER, "the job is requeued")
    (requeue,) = kinds(run_dir, "requeue")
    assert requeue["reason"] == "stopped" and saved < requeue["step"] == max(steps_of(run_dir))

    wait_for_steps(cluster, job, run_dir, 3)
    cluster.crash_node("node2")
    cluster.wait(lambda: cluster.job(job).get("Restarts") == "2", LATER, "the job is requeued")
    cluster.start_node("node2")
    ended = cluster.wait_for_end(job, LATER)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), said(run_dir)

    expected, found = steps_of(undisturbed), steps_of(run_dir)
    assert list(found) == list(range(1, STEPS + 1))
    assert [[found[s][v] for v in VALUES] for s in found] == [[expected[s][v] for v in VALUES] for s in expected]


def test_a_wrong_partition_is_refused_when_the_job_is_submitted(cluster, tmp_path):
    with pytest.raises(RuntimeError, match="invalid partition specified: none"):
        cluster.submit("--partition=none", str(SCRIPT), cwd=tmp_path)


@pytest.mark.parametrize(
    "option, sentence",
    [
        ("--optimizer.lr=0", "error: optimizer.lr is 0.0, but must be greater than 0."),
        ("--data.dataset_config_file=/nowhere/data.yaml", "/nowhere/data.yaml"),
    ],
    ids=["setting", "path"],
)
def test_a_wrong_setting_ends_the_job_at_once_and_for_good(cluster, data, tmp_path, option, sentence):
    run_dir = tmp_path / "run"
    job = submit(cluster, data, run_dir, option)
    ended = cluster.wait_for_end(job, LATER)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "78:0", "0")
    (line,) = [line for line in said(run_dir).splitlines() if line.strip()]
    assert line.startswith("error: ") and sentence in line
    if os.getloadavg()[0] <= 2 * os.cpu_count():  # else it waits for others, not for itself
        hours, minutes, seconds = map(int, ended["RunTime"].split(":"))
        assert hours == minutes == 0 and seconds < SOON
