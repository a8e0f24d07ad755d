"""The packing benchmark runs, and the three ways that it times give the same tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megabagel.packing import native

TOOL = Path(__file__).parents[2] / "tools" / "bench_packing.py"


@pytest.mark.skipif(native.PLANNER is None, reason="the C++ planner is not built")
def test_a_short_run_ends_in_its_ratios():
    command = [sys.executable, TOOL, "--runs", "1", "--tokens", "9000", "--copies", "1,3", "--samples", "300"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    assert result["bench"] == "packing" and result["units"].keys() == result["ratios"].keys()
    assert result["ratios"]["bytes per token, largest / smallest"] == 1
    assert result["ratios"]["best fit"] > result["ratios"]["greedy"]
