"""A run that loses a node goes on with the others: fewer replicas, the same data, the same losses."""

import json
import os
import subprocess
import sys

import pytest

from megabagel.runtime import events
from tests.distributed.launch import ROOT, launch_ok
from tests.tiny_data import training_options, write_data

STEPS = 24  # enough to be at work when the first checkpoint is whole and the node goes


@pytest.mark.timeout(1800)
def test_a_lost_node_leaves_fewer_replicas_that_go_on_with_the_same_data(tmp_path):
    run_dir, data_file = tmp_path / "run", write_data(tmp_path / "data")
    options = [*training_options(data_file, run_dir, STEPS), "--checkpoint.save_interval=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "tests/e2e/node_loss_program.py", str(run_dir), *options]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700)
    logs = "\n".join(log.read_text()[-3000:] for log in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    starts = [e for e in events.read(run_dir) if e["kind"] == "start"]
    assert [e["dp_size"] for e in starts][-2:] == [2, 1] and starts[-1]["step"] >= 2
    alone = tmp_path / "alone"
    launch_ok("megabagel.train", *training_options(data_file, alone, STEPS), processes=1, timeout=600)
    lines = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (run_dir, alone)]
    assert [m["step"] for m in lines[0]] == list(range(1, STEPS + 1))
    for ours, theirs in zip(*lines, strict=True):
        assert ours["tokens"] == theirs["tokens"] and ours["samples_seen"] == theirs["samples_seen"]
        for key in ("ce", "mse"):
            expected = theirs[key] and pytest.approx(theirs[key], rel=1e-3)  # None where no token carries that loss
            assert ours[key] == expected, (key, ours["step"])
