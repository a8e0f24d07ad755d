"""What is frozen stays bit-equal, everything else moves."""

import dataclasses

import numpy as np
import pytest
import torch

from megabagel.checkpoint.hf import load_weights, open_source, stage_rules
from megabagel.config.folder import read_model_config
from megabagel.config.schema import Config, ParallelConfig
from megabagel.models.build import build_stages
from megabagel.models.embeddings import StreamInputs
from megabagel.packing.geometry import SpecialTokens, geometry_of
from megabagel.packing.plan import PackPlan
from megabagel.packing.planner import build_plan
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import plan_sample
from megabagel.runtime import distributed
from megabagel.training.optimizer import build_optimizer
from megabagel.training.step import count, forward_backward
from megabagel.training.wrap import wrap
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


def _is_trained_under_freeze_und(released: str) -> bool:
    """As in the official code: only these train when the und tokens are detached everywhere."""
    return "_moe_gen" in released or released.startswith(
        ("vae2llm", "llm2vae", "time_embedder", "language_model.lm_head")
    )


FROZEN = {  # by released names
    "freeze_llm": lambda name: name.startswith("language_model."),
    "freeze_vit": lambda name: name.startswith("vit_model."),
    "freeze_und": lambda name: not _is_trained_under_freeze_und(name),
}


@pytest.mark.parametrize("switch", FROZEN)
def test_frozen_tensors_stay_and_all_others_move(switch, layout):
    config = Config()
    config.training.params_dtype = "fp32"
    config.optimizer.lr = 1e-3
    config.parallel.overlap_grad_reduce = True  # a parameter outside the graph would stop the second step
    config.checkpoint.init_from = str(CHECKPOINT)
    config.model = dataclasses.replace(read_model_config(str(CHECKPOINT), config.model), **{switch: True})
    stage = build_stages(config, layout.device)[0]
    load_weights([stage], open_source(config))
    before = {name: parameter.detach().clone() for name, parameter in stage.named_parameters()}
    released = {name: rule.names for name, rule in stage_rules(stage).items()}
    plan = _plan(config)
    generator = torch.Generator().manual_seed(0)
    tokens, width = plan.gen_index.numel(), config.model.latent_patch_size**2 * config.model.vae.z_channels
    inputs = StreamInputs(
        torch.randn(plan.vit_rows.numel(), 3 * config.model.vit.patch_size**2, generator=generator),
        torch.randn(tokens * width, generator=generator),
        torch.randn(tokens, width, generator=generator),
    )
    chunks = wrap([stage], config.parallel)
    optimizer = build_optimizer(config.optimizer, config.training, config.parallel, chunks)
    counts = count([plan], config.training, layout.device)
    for _ in range(3):
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(chunks, [(plan, inputs)], counts, config.training, rows=0)
        optimizer.step()
    moved = {name for name, parameter in stage.named_parameters() if not torch.equal(parameter, before[name])}
    frozen = {name for name in before if all(FROZEN[switch](source) for source in released[name])}
    assert frozen and moved
    assert moved == set(before) - frozen


def test_every_weight_is_in_the_graph_of_a_model_that_makes_no_images(layout):
    config = Config()
    config.training.params_dtype = "fp32"
    config.parallel.overlap_grad_reduce = True
    config.checkpoint.init_from = str(CHECKPOINT)
    config.model = dataclasses.replace(read_model_config(str(CHECKPOINT), config.model), visual_gen=False)
    stage = build_stages(config, layout.device)[0]
    load_weights([stage], open_source(config))
    shape = geometry_of(config.model, SpecialTokens(501, 502, 503, 504))
    sample = Sample([Item("text", text_ids=[5, 6, 7], loss=True)], (0,), "test", "test")
    plan = build_plan([plan_sample(sample, shape, [False])], shape, tile=16)
    width = config.model.latent_patch_size**2 * config.model.vae.z_channels
    inputs = StreamInputs(torch.empty(0, 3 * 14**2), torch.empty(0), torch.empty(0, width))
    chunks = wrap([stage], config.parallel)
    optimizer = build_optimizer(config.optimizer, config.training, config.parallel, chunks)
    counts = count([plan], config.training, layout.device)
    for _ in range(2):
        chunks[0].zero_grad_buffer()
        losses = forward_backward(chunks, [(plan, inputs)], counts, config.training, rows=0)
        optimizer.step()
    assert losses.mse is None and losses.ce > 0
