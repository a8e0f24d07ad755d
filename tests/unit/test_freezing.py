"""What is frozen stays bit-equal, everything else moves."""

import dataclasses

import numpy as np
import pytest
import torch

from megabagel.checkpoint.hf import load_weights, open_source
from megabagel.config.folder import read_model_config
from megabagel.config.schema import Config, ParallelConfig
from megabagel.models.build import build_stage
from megabagel.models.embeddings import StreamInputs
from megabagel.packing.geometry import SpecialTokens, geometry_of
from megabagel.packing.plan import PackPlan
from megabagel.packing.planner import build_plan
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import plan_sample
from megabagel.runtime import distributed
from tests.tiny_data import CHECKPOINT


@pytest.fixture(scope="module")
def layout():
    yield distributed.initialize(ParallelConfig(), 0)
    distributed.destroy()


def _plan(config: Config) -> PackPlan:
    vae, vit = np.zeros((32, 32, 3), np.uint8), np.zeros((28, 28, 3), np.uint8)
    items = [
        Item("vae_image", pixels=vae),
        Item("vit_image", pixels=vit),
        Item("text", text_ids=[5, 6, 7], loss=True),
        Item("vae_image", pixels=vae, loss=True),
    ]
    shape = geometry_of(config.model, SpecialTokens(501, 502, 503, 504))
    return build_plan([plan_sample(Sample(items, (0,), "test", "test"), shape, [False] * 4)], shape, tile=16)


def _is_llm(name: str) -> bool:
    return name.startswith("decoder.") or any(part in name for part in ("word_embeddings", "_norm.", "lm_head"))


FROZEN = {
    "freeze_llm": lambda name: ".vit." not in name and _is_llm(name),
    "freeze_vit": lambda name: ".vit." in name,
    "freeze_und": lambda name: not (".gen." in name or "gen_norm" in name or "llm2vae" in name or "lm_head" in name),
}


@pytest.mark.parametrize("switch", FROZEN)
def test_frozen_tensors_stay_and_all_others_move(switch, layout):
    config = Config()
    config.training.params_dtype = "fp32"
    config.checkpoint.init_from = str(CHECKPOINT)
    config.model = dataclasses.replace(read_model_config(str(CHECKPOINT), config.model), **{switch: True})
    stage = build_stage(config, layout.device)
    load_weights(stage, open_source(config))
    before = {name: parameter.detach().clone() for name, parameter in stage.named_parameters()}
    plan = _plan(config)
    generator = torch.Generator().manual_seed(0)
    tokens, width = plan.gen_index.numel(), config.model.latent_patch_size**2 * config.model.vae.z_channels
    inputs = StreamInputs(
        torch.randn(plan.vit_rows.numel(), 3 * config.model.vit.patch_size**2, generator=generator),
        torch.randn(tokens, width, generator=generator),
        torch.randn(tokens, width, generator=generator),
    )
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        losses = stage(plan, inputs)
        optimizer.zero_grad()
        (losses.ce[:-1].mean() + losses.mse[:-1].mean()).backward()
        optimizer.step()
    moved = {name for name, parameter in stage.named_parameters() if not torch.equal(parameter, before[name])}
    frozen = {name for name in before if FROZEN[switch](name)}
    assert frozen and moved
    assert moved == set(before) - frozen
