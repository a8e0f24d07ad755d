"""A server whose model is split over two processes says and draws what one does, and stops when a client leaves."""

import json
import re

import pytest

from tests.distributed.launch import ROOT, launch_ok


def answers(processes: int) -> dict:
    printed = launch_ok(ROOT / "tests" / "distributed" / "serve_program.py", processes=processes, timeout=300)
    return json.loads(re.search(r"^answers (.*)$", printed, re.MULTILINE)[1])


def test_two_processes_serve_as_one_does():
    alone, together = answers(1), answers(2)
    assert together["texts"] == alone["texts"] and together["after"] == alone["after"]
    assert together["picture"] == pytest.approx(alone["picture"], abs=1.0)
    assert alone["heard"] == together["heard"] == 1
