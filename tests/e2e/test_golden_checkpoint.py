"""The promise that checkpoints load in later versions: committed ones resume, convert and are read as recorded."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megabagel.checkpoint import folder
from megabagel.checkpoint.contents import open_contents
from megabagel.checkpoint.given_weights import open_weights
from megabagel.checkpoint.language_model import export_language_model
from megabagel.checkpoint.language_model import plan as plan_language_model
from tests.golden_checkpoint.make import HERE, ROOT, STEP, exported, train
from tests.tiny_data import write_data

NAMES = sorted(path.name.removesuffix(".tar.xz") for path in HERE.glob("*.tar.xz"))


@pytest.fixture(params=NAMES)
def recorded(request) -> dict:
    return {"name": request.param, **json.loads((HERE / f"{request.param}.json").read_text())}


@pytest.fixture
def run(recorded, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(ROOT)  # the run was started there: paths in its configuration count from it
    with tarfile.open(HERE / f"{recorded['name']}.tar.xz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    return tmp_path / "run"


def test_there_is_one():
    assert NAMES


def test_it_resumes_in_another_layout_as_recorded(run, recorded, tmp_path):
    data_file = write_data(tmp_path / "data")
    found = train(data_file, run, STEP + 1)
    assert found.keys() == recorded["next_step"].keys()
    for key, value in recorded["next_step"].items():
        assert found[key] == pytest.approx(value, rel=1e-5), key
    assert folder.latest_step(run) == STEP + 1


def test_it_converts_to_the_recorded_bits(run, recorded, tmp_path):
    for weights in ("ema", "model"):
        assert exported(run, tmp_path / weights, weights) == recorded[weights]
    assert recorded["ema"] != recorded["model"]
    export_language_model(plan_language_model(open_weights(run, "model"), tmp_path / "text"))
    text, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("text", "model"))
    shared = {f"language_model.{name}": value for name, value in text.items() if not name.endswith("o_proj.bias")}
    assert shared.keys() == {name for name in whole if name.startswith("language_model.") and "_moe_gen" not in name}
    assert all(torch.equal(value, whole[name]) for name, value in shared.items())


def test_its_contents_are_as_they_were(run):
    contents = open_contents(run)
    assert folder.damage(run / f"iter_{STEP:07d}") is None and folder.verify(run / f"iter_{STEP:07d}") is None
    assert contents.facts["layout"] == "tensor 2, context 1, expert 1, pipeline 2, data 1"
    trained = {name for name in contents.shapes if not name.startswith(("optimizer.", "ema.", "vision."))}
    for prefix in ("ema.", "optimizer.state.param.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
        assert {name.removeprefix(prefix) for name in contents.shapes if name.startswith(prefix)} == trained
    assert all(dtype == torch.float32 for dtype in contents.dtypes.values())
