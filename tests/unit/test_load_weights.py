"""Filling a whole stage on one process: every parameter and variant, and what is said about a folder that misfits."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.hf import load_weights, open_source, stage_rules
from megabagel.checkpoint.names import export_shard
from megabagel.config.folder import read_model_config
from megabagel.config.schema import CheckpointConfig, Config, ModelConfig, ParallelConfig, TrainingConfig
from megabagel.models.build import build_stages
from megabagel.runtime import distributed

GOLDEN = Path(__file__).parents[1] / "golden" / "public-basic" / "ckpt"
TABLES = {"latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"}


@pytest.fixture(scope="module")
def layout():
    yield distributed.initialize(ParallelConfig(), 0)
    distributed.destroy()


def filled(layout, folder: str | None, **model: object):
    """A stage of the golden case's shape, with changes, filled from `folder` (None: from scratch)."""
    shape = dataclasses.replace(read_model_config(str(GOLDEN), ModelConfig()), **model)
    config = Config(shape, training=TrainingConfig(params_dtype="fp32"), checkpoint=CheckpointConfig(init_from=folder))
    stage = build_stages(config, layout.device)[0]
    for parameter in stage.parameters():
        parameter.data.fill_(torch.nan)
    load_weights([stage], open_source(config))
    assert not any(parameter.isnan().any() for parameter in stage.parameters())
    return stage


def exported(stage) -> dict[str, torch.Tensor]:
    rules = stage_rules(stage)
    return {
        name: tensor
        for parameter, value in stage.named_parameters()
        for name, (tensor, _) in export_shard(value.detach(), rules[parameter]).items()
    }


def test_a_released_folder_comes_back_out_unchanged(layout):
    stored = load_file(GOLDEN / "ema.safetensors")
    found = exported(filled(layout, str(GOLDEN)))
    assert set(found) == set(stored) - TABLES
    assert all(torch.equal(found[name], stored[name]) for name in found)


@pytest.mark.parametrize(
    "variant, twins",
    [
        ("mot", {"self_attn", "input_layernorm_moe_gen", "post_attention_layernorm_moe_gen", "mlp_moe_gen"}),
        ("moe", {"mlp_moe_gen"}),
        ("dense", set()),
    ],
)
def test_variants_have_the_released_twins_only(layout, variant, twins):
    names = exported(filled(layout, None, layer_variant=variant))
    layer = "language_model.model.layers.0."
    found = {n.removeprefix(layer).split(".")[0] for n in names if n.startswith(layer) and "_moe_gen" in n}
    assert found == twins
    assert ("language_model.model.norm_moe_gen.weight" in names) == (variant != "dense")


def test_missing_and_unexpected_tensors(layout, tmp_path, caplog):
    stored = load_file(GOLDEN / "ema.safetensors")
    gone = "language_model.model.layers.2.self_attn.k_proj_moe_gen.weight"
    save_file({name: tensor for name, tensor in stored.items() if name != gone}, tmp_path / "ema.safetensors")
    with pytest.raises(CheckpointError, match=f"has no tensor {gone}, which the configured model needs"):
        filled(layout, str(tmp_path))
    save_file({**stored, "a.stranger": torch.zeros(2)}, tmp_path / "ema.safetensors")
    with caplog.at_level(logging.WARNING):
        filled(layout, str(tmp_path))
    (warning,) = [record.getMessage() for record in caplog.records if "a.stranger" in record.getMessage()]
    assert "holds 1 tensors that the configured model does not have" in warning


def test_position_tables_tell_what_the_weights_were_trained_with(layout):
    with pytest.raises(CheckpointError, match="has 64 rows, but model.max_latent_size is 16.* to 8, which"):
        filled(layout, str(GOLDEN), max_latent_size=16)


def test_wrong_shape_names_tensor_expected_and_found(layout):
    name = "language_model.model.layers.0.mlp.gate_proj.weight"
    with pytest.raises(CheckpointError, match=rf"tensor {name} .* has shape \[128, 64\], .* expects \[256, 64\]"):
        filled(layout, str(GOLDEN), ffn_hidden_size=256)
