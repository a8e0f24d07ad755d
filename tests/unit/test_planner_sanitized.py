"""The planner's C++ code under the address and undefined-behaviour sanitizers, on random and on broken input."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("fuzz") / "planner_fuzz"
    core = [path for path in (ROOT / "csrc" / "planner").glob("*.cpp") if path.name != "bindings.cpp"]
    sources = [ROOT / "tests" / "native" / "planner_fuzz.cpp", *core]
    subprocess.run(
        [compiler, *FLAGS, "-D_GLIBCXX_ASSERTIONS", f"-I{ROOT / 'csrc'}", *sources, "-o", program], check=True
    )
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)


def test_random_and_broken_input_is_planned_or_refused_cleanly(fuzz):
    result = run(fuzz, "1", "2500")
    assert result.returncode == 0, result.stderr
    assert not result.stderr


def test_a_read_behind_a_table_would_be_seen(fuzz):
    result = run(fuzz, "1", "10", "--planted")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
