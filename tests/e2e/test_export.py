"""Weights in and out: BAGEL folder, checkpoint of a parallel run, BAGEL folder; a run that starts from a checkpoint."""

import filecmp
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.export import export
from megabagel.checkpoint.export_plan import plan_export
from megabagel.checkpoint.released import TorchDistSource
from megabagel.checkpoint.torch_dist import checkpoint_folder
from megabagel.config.folder import read_model_config
from megabagel.config.schema import ModelConfig
from megabagel.inference import FlowSettings, TextSettings, load
from megabagel.runtime import distributed
from tests.distributed.launch import launch_ok
from tests.tiny_data import CHECKPOINT, training_options, write_data

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]

import inspect_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run_dir(data, tmp_path_factory) -> Path:
    """One step on tensor 2 x pipeline 2; the first step of a warm-up has rate 0, so the weights stay what they were."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    options = training_options(data, run_dir, steps=1) + [
        "--checkpoint.save_interval=1",
        "--optimizer.lr_warmup_steps=10",
        "--parallel.tensor_model_parallel_size=2",
        "--parallel.pipeline_model_parallel_size=2",
    ]
    launch_ok("megabagel.train", *options, processes=4)
    return run_dir


def same_tensors(left: Path, right: Path) -> bool:
    a, b = load_file(left), load_file(right)
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_the_folder_comes_back_bit_for_bit(run_dir, tmp_path):
    out = tmp_path / "out"
    export(plan_export(run_dir, out, weights="model"))
    assert same_tensors(out / "model.safetensors", CHECKPOINT / "ema.safetensors")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == json.loads((CHECKPOINT / "model.safetensors.index.json").read_text())["metadata"]
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    side_files = {p.name for p in CHECKPOINT.iterdir()} - {"ema.safetensors", "model.safetensors.index.json"}
    assert {p.name for p in out.iterdir()} == side_files | {"model.safetensors", "model.safetensors.index.json"}
    assert all(filecmp.cmp(CHECKPOINT / name, out / name, shallow=False) for name in side_files)


def test_the_average_is_exported_too(run_dir, tmp_path):
    export(plan_export(run_dir, tmp_path / "out"))
    ours, start = load_file(tmp_path / "out" / "ema.safetensors"), load_file(CHECKPOINT / "ema.safetensors")
    assert ours.keys() == start.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, start[name], rtol=1e-6, atol=1e-7)


def test_without_the_base_folder_everything_is_made_anew(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("megabagel.checkpoint.export_plan._base_of", lambda *_: None)
    out = tmp_path / "out"
    export(plan_export(run_dir, out, weights="model", max_file_bytes=500_000), processes=2)
    parts = sorted(p.name for p in out.glob("*.safetensors") if p.name != "ae.safetensors")
    assert parts == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    found = {name: value for part in parts for name, value in load_file(out / part).items()}
    expected = load_file(CHECKPOINT / "ema.safetensors")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # the position tables are computed, here as there
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6 if "pos_embed.pos" in name else 0)
    assert read_model_config(str(out), ModelConfig()) == read_model_config(str(CHECKPOINT), ModelConfig())
    assert filecmp.cmp(CHECKPOINT / "tokenizer.json", out / "tokenizer.json", shallow=False)
    assert filecmp.cmp(CHECKPOINT / "ae.safetensors", out / "ae.safetensors", shallow=False)


def test_other_dtype(run_dir, tmp_path):
    export(plan_export(run_dir, tmp_path / "out", weights="model", dtype=torch.bfloat16))
    ours, start = load_file(tmp_path / "out" / "model.safetensors"), load_file(CHECKPOINT / "ema.safetensors")
    assert all(torch.equal(value, start[name].bfloat16()) for name, value in ours.items())


def test_an_interrupted_export_goes_on(run_dir, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "tools/convert_dist_to_hf.py",
        "--checkpoint",
        run_dir,
        "--out",
        out,
        "--weights",
        "model",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    journal = out / "unfinished.json"
    deadline = time.monotonic() + 300
    while process.poll() is None and not (journal.is_file() and len(journal.read_text().splitlines()) > 20):
        assert time.monotonic() < deadline
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(CheckpointError, match="holds the beginning of another export"):
        export(plan_export(run_dir, out, weights="ema"))
    told = []
    export(plan_export(run_dir, out, weights="model"), done=told.append)
    assert told[0] > 0 or process.returncode == 0
    assert same_tensors(out / "model.safetensors", CHECKPOINT / "ema.safetensors") and not journal.exists()
    with pytest.raises(CheckpointError, match="is not empty"):
        export(plan_export(run_dir, out, weights="model"))


def test_a_run_starts_from_a_checkpoint_in_another_layout(run_dir, data, tmp_path):
    options = training_options(data, tmp_path / "run", steps=1)
    options += [f"--checkpoint.init_from={run_dir}", "--checkpoint.load_ema=false"]
    options += [f"--data.tokenizer={CHECKPOINT}", f"--checkpoint.init_vae={CHECKPOINT}"]
    launch_ok("megabagel.train", *options, processes=1)
    here, there = (json.loads((path / "metrics.jsonl").read_text()) for path in (tmp_path / "run", run_dir))
    for name in ("ce", "mse"):  # of the first step, before which neither run has changed a weight
        assert here[name] == pytest.approx(there[name], rel=1e-5)


def inspect(capsys, *arguments: object) -> tuple[int, str]:
    code = inspect_checkpoint.main([str(argument) for argument in arguments])
    return code, "".join(capsys.readouterr())


def test_inspection_says_what_is_in_a_checkpoint(run_dir, capsys):
    code, text = inspect(capsys, run_dir, "--tensors", "^heads.lm_head", "--verify")
    assert code == 0 and "tensor 2, context 1, expert 1, pipeline 2, data 1" in text
    assert "mot, 4 layers of 64" in text and "step       1\n" in text
    assert "heads.lm_head.weight  [512, 64]  float32\n" in text and "tensors can be read and are finite" in text
    found = re.findall(r"^(\D+?) +[\d,]+ tensors +([\d,]+) values", text, re.MULTILINE)
    values = {family: int(number.replace(",", "")) for family, number in found}
    assert values.keys() == {"weights", "optimizer", "moving average"}
    assert values["optimizer"] == 3 * values["weights"] == 3 * values["moving average"]


def test_inspection_compares_tensor_by_tensor(run_dir, tmp_path, capsys):
    code, text = inspect(capsys, run_dir, "--compare", CHECKPOINT, "--weights", "model")
    assert code == 0 and "165 of 165 tensors are equal in every value" in text
    tensors = load_file(CHECKPOINT / "ema.safetensors")
    tensors["llm2vae.bias"][3] += 0.5
    tensors["vae2llm.bias"] = tensors["vae2llm.bias"].double()
    del tensors["vae2llm.weight"]
    save_file(tensors, tmp_path / "changed.safetensors")
    code, text = inspect(capsys, CHECKPOINT, "--compare", tmp_path / "changed.safetensors")
    assert code == 1 and "only in the first: 1 tensors, for example vae2llm.weight" in text
    assert "165 of 166 tensors are equal in every value, 1 differ in dtype" in text
    assert "llm2vae.bias: largest difference 0.5, 93.8% of the values equal" in text
    code, text = inspect(capsys, run_dir, "--compare", CHECKPOINT)
    assert code == 1 and "no tensor has a name in both" in text
    tensors["llm2vae.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "changed.safetensors")
    code, text = inspect(capsys, tmp_path / "changed.safetensors", "--verify")
    assert code == 1 and "llm2vae.bias holds 1 values that are not finite" in text
    code, text = inspect(capsys, tmp_path)
    assert code == 1 and text.startswith("error: ")


def test_a_checkpoint_generates_what_its_folder_does(run_dir):
    writing, drawing = TextSettings(max_tokens=6), FlowSettings(num_timesteps=3)
    try:
        models = [load(run_dir, load_ema=False), load(CHECKPOINT)]
        answers = [model.answers(["How many?"], writing) for model in models]
        drawn = [model.pictures(["A house"], drawing, height=32, width=48)[0].image for model in models]
    finally:
        distributed.destroy()
    assert answers[0] == answers[1] != [""]
    assert drawn[0].tobytes() == drawn[1].tobytes()


def test_what_does_not_fit_is_one_sentence(run_dir, tmp_path):
    model = read_model_config(str(CHECKPOINT), ModelConfig())
    source = TorchDistSource(run_dir, model)
    name = "language_model.model.embed_tokens.weight"
    with pytest.raises(CheckpointError, match=r"has shape \[512, 64\], but the configured model expects \[500, 64\]"):
        source.read(name, (500, 64), 0, 0, 250)
    with pytest.raises(CheckpointError, match="has no tensor nothing"):
        source.shape("nothing")
    with pytest.raises(CheckpointError, match="neither a checkpoint .* nor a run folder"):
        checkpoint_folder(tmp_path)
    damaged = tmp_path / "iter_0000001"
    damaged.mkdir()
    for file in (run_dir / "iter_0000001").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    part = next(damaged.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"has a damaged file .*distcp"):
        checkpoint_folder(damaged)
