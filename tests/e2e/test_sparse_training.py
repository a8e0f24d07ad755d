"""The entry point with sparse experts out of a dense checkpoint, spread over ranks; then continued on one rank."""

import shutil
from pathlib import Path

import pytest

from megabagel.checkpoint import folder
from tests.distributed.launch import launch_ok
from tests.e2e.test_training import metrics
from tests.tiny_data import training_options, write_data

SPARSE = [
    "--model.und_num_experts=2",
    "--model.gen_num_experts=4",
    "--model.moe_shared_expert_intermediate_size=24",
    "--model.moe_aux_loss_coeff=0.01",
    "--model.moe_z_loss_coeff=0.001",
    "--checkpoint.save_interval=2",
]
SPREAD = [
    "--parallel.tensor_model_parallel_size=2",
    "--parallel.pipeline_model_parallel_size=2",
    "--parallel.expert_model_parallel_size=2",
    "--parallel.sequence_parallel=true",
]


def train(data_file: Path, run_dir: Path, *layout: str, processes: int) -> str:
    options = [*training_options(data_file, run_dir, 4), *SPARSE, *layout]
    return launch_ok("megabagel.train", *options, processes=processes, timeout=300)


def cut_back(run_dir: Path, copy: Path) -> Path:
    """A copy of the run folder as it was after step 2."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(folder.step_folder(copy, 4))
    (copy / folder.LATEST).write_text("2")
    return copy


def test_experts_on_several_ranks_train_and_continue_on_one_rank(tmp_path):
    data_file = write_data(tmp_path / "data")
    output = train(data_file, tmp_path / "whole", *SPREAD, processes=4)
    assert output.count("sparse experts start as copies") == 1
    whole = metrics(tmp_path / "whole")
    assert all(line["moe_aux_loss"] > 1 and line["moe_z_loss"] > 0 for line in whole)
    assert all(1 <= line["encode_balance"] <= 4 for line in whole)

    alone = cut_back(tmp_path / "whole", tmp_path / "alone")
    train(data_file, alone, processes=1)
    for one, four in zip(metrics(alone), whole, strict=True):
        for key in ("ce", "mse", "grad_norm", "params_norm", "moe_aux_loss", "moe_z_loss"):
            assert one[key] == pytest.approx(four[key], rel=1e-5), key
