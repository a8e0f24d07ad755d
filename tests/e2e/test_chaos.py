"""Ranks of a run are killed and stopped, and one of its batches is poisoned: it ends as if it had been left alone."""

import json
import os
import subprocess
import sys

import pytest

from tests.distributed.launch import ROOT
from tests.tiny_data import training_options, write_data

KILLS, STOPS, POISONED, STEPS = 2, 1, 4, 8
OURS = ("checkpoint.run_dir", "training.train_steps", "checkpoint.save_interval")  # what the tool or this test sets


@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_stopped_and_poisoned_ends_with_the_parameters_of_one_left_alone(tmp_path):
    run_dir, data_file = tmp_path / "run", write_data(tmp_path / "data")
    options = [o for o in training_options(data_file, run_dir) if not o.removeprefix("--").startswith(OURS)]
    tool = [sys.executable, "tools/run_chaos.py", f"--run-dir={run_dir}", f"--kills={KILLS}", f"--stops={STOPS}"]
    tool += [f"--poison={POISONED}", f"--steps={STEPS}", "--hang-seconds=10", "--limit=1500", "--"]
    options += ["--checkpoint.save_interval=2", "--parallel.tensor_model_parallel_size=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*tool, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700)
    logs = "\n".join(log.read_text()[-3000:] for log in sorted(run_dir.glob("chaos/*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    report = json.loads(done.stdout)
    assert report["different"] == []
    assert sorted(fault["signal"] for fault in report["faults"]) == ["SIGKILL"] * KILLS + ["SIGSTOP"] * STOPS
    assert all(fault["to_train_again"] is not None for fault in report["faults"])
    assert report["steps"] == STEPS and report["skipped_steps"] >= 1
    assert any("out of reach is rank" in message for message in report["hangs"])
    assert 0 < report["ratios"]["effective_training_time"] < 1
