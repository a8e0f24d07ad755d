"""The entry point as a user runs it: layouts agree, packs may lack a modality, a killed run resumes bit for bit."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.distributed.launch import ROOT, launch_ok
from tests.tiny_data import training_options, write_data
from tools import encode_latents

LAYOUTS = {1: [], 2: ["--parallel.tensor_model_parallel_size=2"], 4: ["--parallel.pipeline_model_parallel_size=2"]}
LAYOUTS[4] = LAYOUTS[4] + LAYOUTS[2]


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(run_dir: Path) -> list[tuple]:
    """What must be equal between runs that compute the same."""
    return [(m["step"], m["ce"], m["mse"], m["lr"], m["grad_norm"], m["tokens"]) for m in metrics(run_dir)]


def train(data_file: Path, run_dir: Path, *extra: str, processes: int = 1, steps: int = 3) -> list[dict]:
    options = [*training_options(data_file, run_dir, steps), *LAYOUTS[processes], *extra]
    launch_ok("megabagel.train", *options, processes=processes, timeout=180)
    return metrics(run_dir)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_a_model_trains_from_scratch_alike_on_any_layout(data_file, tmp_path):
    scratch = ["--model.layer_variant=moe", "--checkpoint.init_from=null", "--model.folder=null"]
    golden = ROOT / "tests/golden/public-basic/ckpt"
    shape = ["--config=tiny", f"--checkpoint.init_vae={golden}", f"--data.tokenizer={golden}"]
    runs = []
    for processes in (1, 4):
        options = training_options(data_file, tmp_path / str(processes))
        launch_ok("megabagel.train", *shape, *options, *scratch, *LAYOUTS[processes], processes=processes, timeout=180)
        runs.append(metrics(tmp_path / str(processes)))
    for alone, together in zip(*runs, strict=True):
        for key in ("ce", "mse", "grad_norm"):
            assert together[key] == pytest.approx(alone[key], rel=1e-5), key


@pytest.mark.parametrize(
    ("group", "absent"),
    [("t2i_pretrain", "ce"), ("text", "mse"), ("vlm_sft", "mse")],
    ids=["no-text-loss", "text-only", "no-vae"],
)
def test_packs_that_lack_a_modality_train_on_tensor_and_pipeline_ranks(group, absent, tmp_path):
    data_file = write_data(tmp_path / "data", (group,))
    present = "ce" if absent == "mse" else "mse"
    alone, together = (train(data_file, tmp_path / str(n), processes=n) for n in (1, 4))
    for one, four in zip(alone, together, strict=True):
        assert one[absent] is None and four[absent] is None
        for key in (present, "grad_norm", "params_norm"):
            assert four[key] == pytest.approx(one[key], rel=1e-5), key


def test_stored_latents_and_features_train_like_pictures_which_may_then_be_gone(tmp_path):
    data_file, frozen = write_data(tmp_path / "data", rows=8), "--model.freeze_vit=true"
    alone = train(data_file, tmp_path / "pictures", frozen, steps=2)
    out = tmp_path / "latents"
    assert encode_latents.main([f"--out={out}", "--vit", *training_options(data_file, tmp_path), frozen]) == 0
    groups = yaml.safe_load(data_file.read_text())
    for name, group in groups.items():
        group["latents_dir"] = str(out / name)
    data_file.write_text(yaml.safe_dump(groups))
    for picture in (tmp_path / "data" / "vlm_sft").glob("*.png"):
        picture.unlink()
    together = train(data_file, tmp_path / "stored", frozen, "--data.num_workers=1", processes=2, steps=2)
    for one, two in zip(alone, together, strict=True):
        for key in ("ce", "mse", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), key
        assert two["tokens"] == one["tokens"] and two["skipped_samples"] == 0
        assert two["encode_balance"] is None  # nothing was left to encode


def test_a_killed_run_resumes_bit_for_bit(data_file, tmp_path):
    extra = ["--data.num_workers=2", "--checkpoint.save_interval=2"]
    whole = train(data_file, tmp_path / "whole", *extra, processes=2, steps=7)
    assert [line["step"] for line in whole if "save_blocked_time" in line] == [2, 4, 6, 7]
    assert sum("save_time" in line for line in whole) >= 1 and whole[-1]["save_time"] >= whole[-1]["save_blocked_time"]

    run_dir = tmp_path / "killed"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "megabagel.train", *training_options(data_file, run_dir, 7), *LAYOUTS[2], *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    victim = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    kill_after = random.randint(3, 5)
    log = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= kill_after):
        assert victim.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.05)
    launcher = psutil.Process(victim.pid)
    for process in [*launcher.children(recursive=True), launcher]:  # ranks have sessions of their own
        process.kill()
    victim.wait()
    assert not (run_dir / "iter_0000007").exists(), "the run ended before it could be killed"

    train(data_file, run_dir, *extra, processes=2, steps=7)
    assert numbers(run_dir) == numbers(tmp_path / "whole")
    states = [folder / "iter_0000007" for folder in (run_dir, tmp_path / "whole")]
    launch_ok(ROOT / "tests/e2e/compare_checkpoints.py", *states, processes=1)
