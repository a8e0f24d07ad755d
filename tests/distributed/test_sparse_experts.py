"""Sparse experts in layouts of four processes: numbers of plain PyTorch, and checkpoints, all in one launch."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch_ok

PROGRAM = Path(__file__).with_name("sparse_program.py")
LAYOUTS = {  # tensor, context, expert, sequence: what is left of four ranks is data parallel
    "1,1,1,0": "data parallel",
    "1,1,2,0": "two experts per rank",
    "1,1,4,0": "one expert per rank, the last one unused",
    "2,1,1,0": "tensor-parallel ranks route their share of equal rows",
    "2,1,1,1": "sequence parallel",
    "2,1,2,0": "experts on the tensor-parallel ranks",
    "2,1,4,1": "experts on tensor- and data-parallel ranks, sequence parallel",
    "1,2,2,0": "experts on the context-parallel ranks",
    "2,2,4,1": "experts on the tensor- and context-parallel ranks of one pack",
}


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> str:
    return launch_ok(PROGRAM, tmp_path_factory.mktemp("runs") / "run", *LAYOUTS, processes=4, timeout=400)


def test_every_layout_trains_as_plain_pytorch_does(output):
    reports = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [report["layout"] for report in reports] == list(LAYOUTS)
    assert [r for r in reports if r["values"] > 1e-5 or r["weights"] > 1e-5] == []


def test_resume_is_equal_to_the_bit_and_other_layouts_continue(output):
    assert output.count("resumed") == 4  # asserted by the program on every rank
