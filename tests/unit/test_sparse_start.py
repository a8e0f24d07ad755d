"""Start checkpoints with sparse experts, made of dense weights: what they hold, and how a run from one begins."""

import sys
from math import prod
from pathlib import Path

import pytest
import torch

from megabagel.checkpoint.contents import open_contents
from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.folder import begin, damage, finish, records, verify
from megabagel.checkpoint.given_weights import open_weights
from megabagel.checkpoint.language_model import plan as plan_language_model
from megabagel.checkpoint.names import fill_shard, rule_for
from megabagel.checkpoint.own_keys import own_shapes
from megabagel.checkpoint.pieces import Place
from megabagel.checkpoint.released import TorchDistSource
from megabagel.checkpoint.sources import SafetensorsFolder, Scratch
from megabagel.checkpoint.sparse_start import plan_upcycling, upcycle
from megabagel.checkpoint.torch_dist_writer import PieceWriter
from megabagel.checkpoint.torch_dist_writer import finish as finish_files
from megabagel.checkpoint.upcycling import Upcycled
from megabagel.config.errors import ConfigError
from megabagel.config.folder import read_model_config, side_folder
from megabagel.config.load import to_yaml
from megabagel.config.schema import Config, ModelConfig, ParallelConfig, TrainingConfig
from megabagel.runtime import distributed
from tests.tiny_data import CHECKPOINT, GOLDEN
from tests.unit.test_sparse_model import SPARSE, Model

sys.path.insert(0, str(GOLDEN.parents[1] / "tools"))
import upcycle_checkpoint

FLAGS = ["--und-num-experts=2", "--gen-num-experts=4", "--moe-shared-expert-intermediate-size=24"]
FROZEN = "vision."


@pytest.fixture(scope="module")
def layout():
    yield distributed.initialize(ParallelConfig(), 0)
    distributed.destroy()


@pytest.fixture(scope="module")
def start(layout, tmp_path_factory):
    out = tmp_path_factory.mktemp("sparse") / "start"
    assert upcycle_checkpoint.main(["--checkpoint", str(CHECKPOINT), "--out", str(out), *FLAGS]) == 0
    return out


@pytest.fixture(scope="module")
def dense_run(layout, tmp_path_factory):
    """A run folder: bfloat16 weights, a float32 average of all that is not frozen, random."""
    run = tmp_path_factory.mktemp("dense")
    model = read_model_config(str(CHECKPOINT), ModelConfig())
    draw = torch.Generator().manual_seed(3)
    partial, pieces = begin(run, 7), []
    for key, shape in own_shapes(model).items():
        for prefix in ("",) if key.startswith(FROZEN) else ("", "ema."):
            value = torch.randn(shape, generator=draw)
            pieces += Place(prefix + key, shape, (0,) * len(shape), shape).whole(
                value, None if prefix else torch.bfloat16
            )
    config = Config(model, training=TrainingConfig(params_dtype="bf16"))
    config.checkpoint.init_from = str(CHECKPOINT)
    common = {"run": {"step": 7, "counters": {}, "layout": (1, 1, 1, 1, 1), "config_yaml": to_yaml(config)}}
    finish_files(partial, [PieceWriter(partial, 0).write(pieces)], common)
    finish(run, 7, records(partial))
    return run


def test_a_run_from_it_begins_as_the_dense_model(layout, start):
    dense, sparse = Model(layout), Model(layout, folder=str(start), **SPARSE)
    at_once = Model(layout, **SPARSE)
    assert sparse.before.keys() == at_once.before.keys()
    assert all(torch.equal(value, at_once.before[name]) for name, value in sparse.before.items())
    torch.testing.assert_close(sparse.step(), dense.step(), rtol=1e-6, atol=0)


def test_its_folder_is_whole_and_looks_like_any_other(start, capsys):
    folder = start / "iter_0000000"
    assert damage(folder) is None and verify(folder) is None
    contents = open_contents(start)
    names = {path.name for path in Path(side_folder(str(start))).iterdir()}
    assert {"tokenizer.json", "ae.safetensors", "llm_config.json"} <= names and "ema.safetensors" not in names
    assert contents.facts["step"] == "0" and contents.shapes["decoder.layers.gen.mlp.router.weight"] == (4, 4, 64)
    assert upcycle_checkpoint.main(["--checkpoint", str(start), "--out", str(start / "x"), *FLAGS]) == 1
    assert "has sparse experts already" in capsys.readouterr().err
    assert upcycle_checkpoint.main(["--checkpoint", str(CHECKPOINT), "--out", str(start), *FLAGS]) == 1
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="understanding stream of .* has sparse experts"):
        plan_language_model(open_weights(start), start / "x")


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_of_a_layout_reads_its_own_part(start, rank):
    model = open_weights(start).model
    ours = TorchDistSource(start, model)
    theirs = Upcycled(SafetensorsFolder(CHECKPOINT, ("ema",)), Scratch(TrainingConfig().seed, model.init_std))
    for name, shape, is_expert in (
        ("gen.mlp.experts.local_experts.1.linear_fc1.weight", (256, 64), True),
        ("und.mlp.experts.linear_fc2.weight0", (64, 128), True),
        ("und.mlp.shared_experts.linear_fc1.weight", (24, 64), False),
        ("gen.mlp.router.weight", (4, 64), False),
        ("gen.linear_qkv.weight", (64, 64), False),
    ):
        rule = rule_for(f"decoder.layers.1.{name}", shape, 2, 2, model, is_expert, (rank, 2))
        shards = torch.full((2, *shape), torch.nan)
        for shard, source in zip(shards, (ours, theirs), strict=True):
            fill_shard(shard, source, rule, rank, 2)
        assert torch.equal(*shards) and not shards.isnan().any(), name


def test_a_checkpoint_keeps_its_weights_average_and_types(dense_run, tmp_path):
    told: list[int] = []
    plan = plan_upcycling(dense_run, tmp_path / "out", gen_num_experts=2)
    upcycle(plan, told.append)
    before, after = open_contents(dense_run), open_contents(tmp_path / "out")
    assert (Path(side_folder(str(tmp_path / "out"))) / "tokenizer.json").is_file()
    assert sum(told) == plan.num_bytes == sum(prod(s) * after.dtypes[n].itemsize for n, s in after.shapes.items())
    for name in before.shapes.keys() & after.shapes.keys():
        assert after.dtypes[name] == before.dtypes[name] and torch.equal(after.read(name), before.read(name)), name
    replaced = {f"{p}decoder.layers.gen.mlp.linear_fc{n}.weight" for p in ("", "ema.") for n in (1, 2)}
    assert before.shapes.keys() - after.shapes.keys() == replaced
    experts = {f"{p}decoder.layers.gen.mlp.experts.experts.linear_fc{n}.weight" for p in ("", "ema.") for n in (1, 2)}
    routers = {f"{p}decoder.layers.gen.mlp.router.weight" for p in ("", "ema.")}
    assert after.shapes.keys() - before.shapes.keys() == experts | routers
    for name in experts:
        dense = before.read(name.replace("experts.experts.", ""))
        assert torch.equal(after.read(name), dense[:, None].expand(-1, 2, -1, -1)) and after.dtypes[name] == dense.dtype
    router, average = (after.read(f"{p}decoder.layers.gen.mlp.router.weight") for p in ("", "ema."))
    assert torch.equal(router, average.bfloat16()) and router.float().std() > 0.01


def test_one_set_of_weights_alone(dense_run, tmp_path):
    upcycle(plan_upcycling(dense_run, tmp_path / "out", und_num_experts=2, weights="ema"))
    before, after = open_contents(dense_run), open_contents(tmp_path / "out")
    assert not any(name.startswith("ema.") for name in after.shapes)
    assert torch.equal(after.read("heads.lm_head.weight"), before.read("ema.heads.lm_head.weight"))
    assert torch.equal(after.read("vision.post_layernorm.weight"), before.read("vision.post_layernorm.weight"))


def test_what_cannot_be_is_one_sentence(dense_run, tmp_path):
    for numbers, error, message in (
        ({}, CheckpointError, "no stream gets experts"),
        ({"und_num_experts": 1}, ConfigError, "und_num_experts is 1, but sparse experts are at least 2"),
    ):
        with pytest.raises(error, match=message):
            plan_upcycling(dense_run, tmp_path / "out", **numbers)
    assert not (tmp_path / "out").exists()
