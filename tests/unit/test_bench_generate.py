"""The generation bench runs, its two ways agree, and it ends with its line of JSON."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]

import bench_generate  # noqa: E402


def test_the_bench_runs_and_both_ways_agree(capsys):
    bench_generate.main("--prompt 6 --steps 3 --tokens 3 --repeats 1 --threads 1 --batch 2".split())
    lines = capsys.readouterr().out.splitlines()
    (agreement,) = [line for line in lines if "of each other" in line]
    assert float(re.search(r"within (\S+)", agreement)[1]) < 1e-4 and agreement.endswith("the same texts: True")
    found = json.loads(lines[-1])
    assert found["ratios"].keys() == found["units"].keys() and len(found["ratios"]) == 6
