"""Layouts, the CPU adapter and clean failure, on four real processes."""

import importlib
import re
import time
from pathlib import Path

import pytest

from megabagel.runtime import cpu_megatron
from tests.distributed.launch import launch, launch_ok

PROGRAM = Path(__file__).with_name("runtime_program.py")


def test_layout_seeds_and_adapter():
    assert "layout ok" in launch_ok(PROGRAM, "layout", processes=4)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [("expected", "rank 3: the table has no rows"), ("bug", "rank 3: KeyError: 'missing key'")],
)
def test_failure_of_one_rank_ends_all_and_is_the_last_word(kind, sentence):
    result = launch(PROGRAM, kind, processes=4)
    seconds = time.time() - float(re.search(r"failing at ([\d.]+)", result.stdout)[1])
    assert result.returncode != 0
    assert seconds < 10
    assert result.stdout.rstrip().splitlines()[-1] == sentence
    assert "nobody gets here" not in result.stdout
    before_torchrun = result.stdout.split("torch/distributed/elastic/multiprocessing/api.py")[0]
    assert ("Traceback" in before_torchrun) == (kind == "bug")
    assert set(re.findall(r"^rank (\d)", result.stdout, re.MULTILINE)) == {"3"}


def test_the_same_failure_on_all_ranks_is_said_by_one():
    result = launch(PROGRAM, "everywhere", processes=4)
    assert result.returncode != 0
    assert len(set(re.findall(r"^rank (\d): pid \d+ found the same fault as all others$", result.stdout, re.M))) == 1


def test_every_adapted_place_exists_and_is_adapted():
    for row in cpu_megatron.ROWS:
        place = importlib.import_module(row.module)
        for part in row.name.split("."):
            place = getattr(place, part)
        assert (getattr(place, "__globals__", {}).get("__name__") == cpu_megatron.__name__) or hasattr(
            place, "__wrapped__"
        ), f"{row.module}.{row.name} is still megatron-core's own"


def test_a_missing_place_names_the_version_and_what_to_install():
    row = cpu_megatron.Row("megatron.core.jit", "gone.for_good", "a test", lambda old: old)
    with pytest.raises(RuntimeError, match=r"megatron-core .* has no `megatron.core.jit.gone.for_good`.*install"):
        cpu_megatron._apply(row, importlib.import_module("megatron.core.jit"))
