"""A frozen ViT, which every rank holds and runs before the pipeline: alike on any layout, saved and resumed."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch_ok
from tests.tiny_data import training_options, write_data

PIPELINE = "--parallel.pipeline_model_parallel_size=2"


def test_a_frozen_vit_trains_alike_on_a_pipeline_and_resumes(tmp_path):
    data_file = write_data(tmp_path / "data")

    def train(run: str, steps: int, processes: int, *extra: str) -> list[dict]:
        options = [*training_options(data_file, tmp_path / run, steps), "--model.freeze_vit=true", *extra]
        launch_ok("megabagel.train", *options, processes=processes, timeout=300)
        return [json.loads(line) for line in Path(tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    alone = train("alone", 3, 1)
    saving = "--checkpoint.save_interval=2"
    train("pipeline", 2, 2, saving, PIPELINE)
    together = train("pipeline", 3, 2, saving, PIPELINE)
    assert [m["step"] for m in together] == [1, 2, 3]
    for one, two in zip(alone, together, strict=True):
        for key in ("ce", "mse", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), key
        assert one["encode_balance"] == 1 and 1 <= two["encode_balance"] <= 2
