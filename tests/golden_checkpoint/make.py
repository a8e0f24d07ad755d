"""Writes the committed checkpoint and the numbers that later versions must get from it.

    python -m tests.golden_checkpoint.make NAME     # NAME.tar.xz and NAME.json in this folder

A checkpoint that is here stays: a change of the format adds another one beside it, and all of them must load.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from megabagel.checkpoint.export import export
from megabagel.checkpoint.export_plan import plan_export
from tests.tiny_data import write_data

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = Path("tests/golden/public-basic/ckpt")  # tokenizer and autoencoder; a path of this machine must not be kept
WORK = Path("build/golden_checkpoint")
STEP = 2
KEYS = ("ce", "mse", "grad_norm", "params_norm", "samples_seen")
SETTINGS = {
    "model.hidden_size": 8,
    "model.num_layers": 2,
    "model.num_attention_heads": 2,
    "model.num_query_groups": 2,
    "model.ffn_hidden_size": 16,
    "model.vit.hidden_size": 8,
    "model.vit.num_layers": 1,
    "model.vit.num_attention_heads": 2,
    "model.vit.ffn_hidden_size": 16,
    "model.freeze_vit": "true",  # so that there are parameters without optimizer state and average
    "data.tokenizer": FILES,
    "data.expected_num_tokens": 150,
    "data.max_num_tokens": 260,
    "data.max_num_tokens_per_sample": 200,
    "data.prefer_buffer_before": 75,
    "optimizer.lr": 1e-2,
    "optimizer.lr_warmup_steps": 0,
    "training.global_batch_size": 2,
    "checkpoint.init_vae": FILES,
    "logging.tensorboard": "false",
    "logging.progress_bar": "false",
}
SPREAD = {"parallel.tensor_model_parallel_size": 2, "parallel.pipeline_model_parallel_size": 2}


def train(data_file: Path, run_dir: Path, steps: int, **changes: object) -> dict[str, float]:
    """Train up to `steps` on as many processes as the layout needs, from the repository's root; its last metrics."""
    run = {"data.dataset_config_file": data_file, "checkpoint.run_dir": run_dir, "training.train_steps": steps}
    options = [f"--{name}={value}" for name, value in (SETTINGS | run | changes).items()]
    spread = [] if not SPREAD.keys() <= changes.keys() else ["-m", "torch.distributed.run", "--standalone"]
    command = [sys.executable, *spread, *(["--nproc-per-node=4"] if spread else []), "-m", "megabagel.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--config=tiny", *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    last = (ROOT / run_dir / "metrics.jsonl").read_text().splitlines()[-1]
    return {key: value for key, value in json.loads(last).items() if key in KEYS}


def exported(run: Path, out: Path, weights: str) -> dict[str, str]:
    """Name of every tensor of the BAGEL folder that is made of `run` -> beginning of the SHA-256 of its bytes."""
    export(plan_export(run, out, weights=weights))
    tensors = load_file(out / f"{weights}.safetensors")
    return {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()[:16]
        for name, tensor in sorted(tensors.items())
    }


def main(name: str) -> None:
    os.chdir(ROOT)
    shutil.rmtree(WORK, ignore_errors=True)
    data_file, run = write_data(WORK / "data"), WORK / "run"
    train(data_file, run, STEP, **SPREAD)
    with tarfile.open(HERE / f"{name}.tar.xz", "w:xz", preset=9) as archive:
        for part in (f"iter_{STEP:07d}", "latest_checkpointed_iteration.txt"):
            archive.add(run / part, part, filter=_anonymous)
    expected = {weights: exported(run, WORK / weights, weights) for weights in ("ema", "model")}
    expected["next_step"] = train(data_file, run, STEP + 1)
    (HERE / f"{name}.json").write_text(json.dumps(expected, indent=1) + "\n")
    print((HERE / f"{name}.tar.xz").stat().st_size, "bytes", expected["next_step"])


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main(sys.argv[1])
