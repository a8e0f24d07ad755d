"""What a run writes about its steps: one line a step, tags that users know, curves; and the arithmetic of FLOPs."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megabagel.config.load import load_config
from megabagel.config.schema import Config
from megabagel.models.costs import autoencoder_flops
from megabagel.training.console import Console
from megabagel.training.flops import COMPONENTS, component_flops, official_flops, pack_flops, peak_tflops
from megabagel.training.metrics import MetricsWriter
from megabagel.training.metrics_file import read_metrics
from tests.tiny_data import GOLDEN
from tests.unit.test_packing import golden_plan

ROOT = Path(__file__).parents[2]


def values(step: int) -> dict:
    """What the training loop reports; odd steps hold no noised picture."""
    return {
        "ce": 3.0 / step,
        "mse": None if step % 2 else 0.5 / step,
        "lr": 1e-3,
        "grad_norm": 1.25,
        "tokens_per_sec": 12345.6,
        "tflops_per_device": 2.0,
        "tokens": 100,
        "ce_tokens": 60,
        "mse_tokens": 0 if step % 2 else 16,
        "samples": 3,
        "samples_seen": 3 * step,
        "memory_bytes": None,
        "step_time": 0.5,
        "skipped_samples": 2 * (step - 1),
        "data/samples/vlm_sft": 50 * step,
        "data/faults/over_long": step,
    }


def config_with(**logging) -> Config:
    config = Config()
    config.logging = dataclasses.replace(config.logging, **logging)
    return config


def run(run_dir: Path, config: Config, first: int, last: int, start_step: int = 0) -> None:
    writer = MetricsWriter(run_dir, config, start_step=start_step, train_steps=10)
    for step in range(first, last + 1):
        writer.write(step, values(step))
    writer.close()
    writer.close()


def test_each_step_is_one_object_and_a_missing_loss_is_null(tmp_path):
    run(tmp_path, config_with(tensorboard=False, peak_tflops=8.0), 1, 4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["mse"] for line in lines] == [None, 0.25, None, 0.125]
    assert {"step", "ce", "mse", "lr", "grad_norm", "tokens_per_sec", "step_time"} <= lines[0].keys()
    assert lines[0]["mfu"] == 0.25


def test_the_resolved_configuration_is_saved_with_the_run(tmp_path):
    config = config_with(peak_tflops=8.0)
    run(tmp_path, config, 1, 1)
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_a_resumed_run_has_every_step_once(tmp_path):
    config = config_with(tensorboard=False)
    run(tmp_path, config, 1, 7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "ce": 1.')  # killed while it wrote
    run(tmp_path, config, 5, 10, start_step=4)
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 11))


def test_tensorboard_has_the_tags_of_megatron_and_bagel(tmp_path):
    run(tmp_path, config_with(peak_tflops=8.0), 1, 4)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    megatron = {"learning-rate", "batch-size", "grad-norm", "iteration-time", "throughput", "ce", "mse"}
    bagel = {"ce", "mse", "lr", "total_norm", "total_mse_tokens", "total_ce_tokens", "total_samples", "tokens_per_sec"}
    assert megatron | {f"{tag} vs samples" for tag in megatron} | bagel | {"tokens_per_step", "mfu"} <= tags
    assert [event.step for event in events.Scalars("ce vs samples")] == [3, 6, 9, 12]
    assert [event.step for event in events.Scalars("mse")] == [2, 4]
    assert "mem_allocated" not in tags
    assert [event.value for event in events.Scalars("data/faults/over_long")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("data/samples/vlm_sft")] == [50, 100, 150, 200]
    assert "data/faults/over_long vs samples" not in tags
    text = events.Tensors(events.Tags()["tensors"][0])[0].tensor_proto.string_val[0].decode()
    assert "hidden_size: 3584" in text


def test_console_and_tensorboard_follow_the_interval_and_the_file_does_not(tmp_path, capsys):
    run(tmp_path, config_with(log_interval=2), 1, 5)
    assert [line.split("/")[0].split() for line in capsys.readouterr().out.splitlines()] == [
        ["step", "2"],
        ["step", "4"],
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("ce")] == [2, 4]
    assert len(read_metrics(tmp_path)) == 5


def test_a_validation_is_shown_whenever_it_happens(tmp_path, capsys):
    measured = {f"validation/{name}": 1.5 for name in ("loss", "ce", "perplexity")} | {"validation/mse": None}
    writer = MetricsWriter(tmp_path, config_with(log_interval=2), start_step=0, train_steps=9)
    for step in (1, 2, 3):
        writer.write(step, values(step) | (measured if step == 3 else {}))
    writer.close()
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "step 2/9",
        "validation after step 3",
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("validation/perplexity")] == [(3, 1.5)]
    assert "validation/mse" not in events.Tags()["scalars"]
    assert read_metrics(tmp_path)[2]["validation/mse"] is None


def test_the_console_line_has_a_dash_for_what_was_not_measured():
    line = Console(0, 100, progress_bar=True).line(3, values(3))
    assert line.startswith(
        "step   3/100 | ce 1.0000 | mse - | lr 1.00e-03 | grad norm 1.250 | 12,346 tokens/s | 0.500 s/"
    )
    assert line.endswith("| 0.500 s/step | 4 bad rows | left 0:00:00")
    assert "bad rows" not in Console(0, 100, progress_bar=True).line(1, values(1))


def test_curves_are_drawn_and_a_folder_without_metrics_is_named(tmp_path):
    run(tmp_path, config_with(tensorboard=False), 1, 5)
    command = [sys.executable, str(ROOT / "tools/plot_losses.py")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == str(tmp_path / "losses.png"), done.stderr
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    absent = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True, env=environment)
    assert absent.returncode == 1
    assert "holds no metrics.jsonl" in absent.stderr and "Traceback" not in absent.stderr


@pytest.mark.parametrize("case", ["public-basic", "public-wide"])
def test_flops_count_visible_pairs_and_loss_rows(case):
    plan, batch, _ = golden_plan(case)
    model = load_config(["--model.folder", str(GOLDEN / case / "ckpt")]).model
    h, f, layers = model.hidden_size, model.ffn_hidden_size, model.num_layers
    kv = h // model.num_attention_heads * model.num_query_groups
    matrices = h * h + 2 * h * kv + h * h + 3 * h * f
    pairs = sum(int(mask.sum()) for name, mask in batch.items() if name.startswith("attn_mask."))
    tokens = plan.sequence_length
    decoder = layers * (2 * matrices * tokens + 4 * h * pairs)
    channels = model.latent_patch_size**2 * model.vae.z_channels
    heads = 2 * h * (model.vocab_size * len(plan.ce_rows) + channels * (len(plan.mse_rows) + len(plan.gen_index)))
    v, n = model.vit.hidden_size, len(plan.vit_rows)
    squares = sum(length**2 for length in plan.vit_seqlens.tolist())
    tower = model.vit.num_layers * (2 * (4 * v * v + 2 * v * model.vit.ffn_hidden_size) * n + 4 * v * squares)
    tower += 2 * 3 * model.vit.patch_size**2 * v * n
    connector = 2 * (v * h + h * h) * n
    side = model.vae.downsample * model.latent_patch_size
    pixels = [(rows * side, columns * side) for rows, columns in plan.latent_grids.tolist()]
    encoding = sum(autoencoder_flops(model.vae, *size) for size in pixels)
    assert pack_flops(plan, model) == 3 * (decoder + heads + tower + connector) + encoding
    parts = component_flops(plan, model)
    assert sum(parts.values()) == pack_flops(plan, model) and parts.keys() == set(COMPONENTS)
    assert parts["vit"] == 3 * tower and parts["vae"] == encoding > 0
    half = component_flops(plan, model, [False] + [True] * (len(pixels) - 1), [True] * len(plan.vit_seqlens))
    assert half == parts | {"vit": 0, "vae": autoencoder_flops(model.vae, *pixels[0])}
    weights = layers * matrices + 2 * h * model.vocab_size
    all_pairs = sum(length**2 for length in plan.sample_lens.tolist())
    assert official_flops(plan, model) == 6 * weights * tokens + 12 * h * layers * all_pairs

    frozen_vit = dataclasses.replace(model, freeze_vit=True)
    assert pack_flops(plan, model) - pack_flops(plan, frozen_vit) == 2 * tower
    assert pack_flops(plan, dataclasses.replace(model, freeze_und=True)) < pack_flops(plan, model)
    frozen_llm = dataclasses.replace(model, freeze_llm=True)
    head = 2 * h * model.vocab_size * len(plan.ce_rows)
    assert pack_flops(plan, model) - pack_flops(plan, frozen_llm) == layers * 2 * matrices * tokens + head


def test_flops_of_sparse_experts_are_those_that_a_token_passes():
    plan, _, _ = golden_plan("public-basic")
    dense = load_config(["--model.folder", str(GOLDEN / "public-basic" / "ckpt")]).model
    h, f, layers = dense.hidden_size, dense.ffn_hidden_size, dense.num_layers
    und, gen = len(plan.und_index), len(plan.gen_index)
    alike = dataclasses.replace(dense, gen_num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=f // 2)
    router = 3 * 2 * h * 8 * layers
    assert pack_flops(plan, alike) - pack_flops(plan, dense) == router * gen
    both = dataclasses.replace(alike, und_num_experts=8)
    assert pack_flops(plan, both) - pack_flops(plan, alike) == router * und
    shared = dataclasses.replace(both, moe_shared_expert_intermediate_size=10, moe_ffn_hidden_size=None)
    more = 3 * 2 * h * 3 * (10 + f) * layers
    assert pack_flops(plan, shared) - pack_flops(plan, both) == more * (und + gen)
    one_mlp = dataclasses.replace(dense, layer_variant="dense", und_num_experts=8, moe_ffn_hidden_size=f // 2)
    assert pack_flops(plan, one_mlp) == pack_flops(plan, both)


def test_peaks_are_known_by_device_name_and_only_for_bf16():
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == peak_tflops("NVIDIA H200", "bf16") == 989.0
    assert peak_tflops("NVIDIA H100 PCIe", "bf16") == 756.0
    assert peak_tflops("NVIDIA L40S", "bf16") == 362.0
    assert peak_tflops("NVIDIA H20", "bf16") == 148.0
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_tflops("Some CPU", "bf16") is None
