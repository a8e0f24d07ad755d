"""Checkpoints: resume to the bit, loading in other layouts, a save that hangs. One launch serves several checks."""

import json
import time
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from megabagel.checkpoint import folder
from megabagel.config.schema import ParallelConfig
from megabagel.runtime.distributed import destroy, initialize
from tests.distributed.launch import launch, launch_ok

PROGRAM = Path(__file__).with_name("checkpoint_program.py")


def run(mode: str, run_dir: Path, tp: int, pp: int, processes: int, dtype: str = "fp32") -> dict:
    output = run_dir.parent / f"{mode}-{tp}-{pp}-{processes}-{dtype}.json"
    launch_ok(PROGRAM, mode, output, run_dir, tp, pp, dtype, processes=processes, timeout=240)
    return json.loads(output.read_text())


def plain_tensors(run_dir: str | Path) -> dict[str, torch.Tensor]:
    loaded = dist_checkpointing.load_plain_tensors(str(folder.step_folder(run_dir, 2)))
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run folder written under TP2 x PP2 by a run that also resumed from it, equal to the bit (asserted there)."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    run("resume", run_dir, 2, 2, 4)
    return run_dir


def test_resume_is_equal_to_the_bit_and_the_moving_average_to_its_formula(saved):
    assert folder.latest_step(saved) == 2 and folder.damage(folder.step_folder(saved, 2)) is None


def test_resume_with_overlap_in_bf16_is_equal_to_the_bit(tmp_path):
    run("overlap", tmp_path / "run", 2, 1, 4, "bf16")


def test_other_layouts_load_the_same_tensors_and_train_on_equally(saved):
    single = run("continue_from", saved, 1, 1, 1)
    data_parallel = run("continue_from", saved, 1, 1, 2)
    assert single["data_state"] == data_parallel["data_state"] == {"counts": [2]}
    torch.testing.assert_close(
        torch.tensor(single["records"]), torch.tensor(data_parallel["records"]), rtol=1e-6, atol=0
    )
    initialize(ParallelConfig(), seed=1)
    try:
        original = plain_tensors(saved)
        for other in (single, data_parallel):
            copy = plain_tensors(other["copy"])
            assert copy.keys() == original.keys()
            for name, tensor in original.items():
                assert torch.equal(tensor, copy[name]), name
    finally:
        destroy()
    weights = {name for name in original if not name.startswith(("optimizer.", "ema."))}
    assert {f"ema.{name}" for name in weights if name != "project_in.bias"} <= original.keys()
    assert "ema.project_in.bias" not in original and original["ema.project_out.weight"].dtype == torch.float32


def test_a_failure_does_not_wait_for_a_save_that_hangs(tmp_path):
    begin = time.monotonic()
    done = launch(PROGRAM, "stuck", tmp_path / "s.json", tmp_path / "run", 1, 1, processes=2)
    assert done.returncode != 0 and "something else" in done.stdout
    assert time.monotonic() - begin < 100  # nearly all of it is the start
