"""The loss bench runs, checks its ways against each other and ends with its line of JSON."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]

import bench_loss  # noqa: E402


def test_the_bench_runs_on_a_tiny_vocabulary(monkeypatch, capsys):
    memory = {"chunked": 1.0, "full": 4.0, "plain": 8.0}  # a process of its own for each
    monkeypatch.setattr(bench_loss, "memory_of_all", lambda case, options: memory)
    small = "--rows 20 --classes 50 --hidden 8 --chunk-rows 6 --repeats 1 --threads 1".split()
    monkeypatch.setattr(sys, "argv", ["bench_loss.py", *small])
    bench_loss.main()
    *lines, last = capsys.readouterr().out.splitlines()
    differences = [float(re.search(r"within (\S+)", line)[1]) for line in lines[:3]]
    assert differences[0] == 0 and max(differences) < 1e-5
    assert json.loads(last)["ratios"]["chunked against full, peak memory"] == 0.25
