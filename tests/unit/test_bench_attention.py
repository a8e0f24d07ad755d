"""The attention bench runs, checks both ways against each other and ends with its line of JSON."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]

import bench_attention  # noqa: E402


def test_the_bench_runs_on_a_tiny_pack(monkeypatch, capsys):
    monkeypatch.setattr(bench_attention, "memory_alone", lambda pack, tokens, way: 1.0)  # a process of its own
    small = "--packs texts --sizes 640 --heads 2 --kv-heads 1 --head-dim 8 --repeats 1 --threads 1".split()
    monkeypatch.setattr(sys, "argv", ["bench_attention.py", *small])
    bench_attention.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "40695 pairs" in lines[0]
    ratios = json.loads(last)["ratios"]
    assert ratios["texts: pairs, largest over smallest size"] == 1
    assert ratios["texts: speed-up over dense masks, largest size"] > 0
