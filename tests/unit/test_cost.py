"""A sample's cost from its layout is what is counted from the plan of a pack, and what encoding its pictures takes."""

import dataclasses
import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabagel.config.load import load_config
from megabagel.config.schema import ModelConfig
from megabagel.models.costs import autoencoder_flops, vision_flops
from megabagel.packing.geometry import Geometry
from megabagel.packing.planner import build_plan
from megabagel.packing.splits import VAE, VIT, PlannedSample
from megabagel.training.cost_model import cost_model
from megabagel.training.flops import pack_flops
from tests.unit.test_packing import CASES, GOLDEN, golden_samples
from tests.unit.test_planner import GEOMETRY, random_pack

SETTINGS = [
    {},
    {"freeze_vit": True},
    {"freeze_llm": True},
    {"freeze_und": True, "freeze_vit": True},
    {"und_num_experts": 8, "gen_num_experts": 4, "moe_ffn_hidden_size": 768},
    {"layer_variant": "dense", "und_num_experts": 8},
]


def autoencoder_cost(samples: list[PlannedSample], model: ModelConfig) -> int:
    """Of encoding the samples' pictures, by their sizes in pixels."""
    stride = model.vae.downsample * model.latent_patch_size
    grids = [piece.grid for sample in samples for piece in sample.pieces if piece.kind == VAE]
    return sum(autoencoder_flops(model.vae, rows * stride, columns * stride) for rows, columns in grids)


def check(samples: list[PlannedSample], geometry: Geometry, model: ModelConfig) -> None:
    costs = cost_model(model)
    expected = pack_flops(build_plan(samples, geometry, tile=16), model)
    assert sum(map(costs.cost, samples)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_golden_samples_add_up_to_their_pack(case):
    samples, geometry, _, _ = golden_samples(case)
    check(samples, geometry, load_config(["--model.folder", str(GOLDEN / case / "ckpt")]).model)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SETTINGS))
def test_any_samples_add_up_to_their_pack(seed, changes):
    check(random_pack(random.Random(seed), GEOMETRY), GEOMETRY, dataclasses.replace(ModelConfig(), **changes))


def test_what_is_stored_beside_the_data_costs_nothing_to_encode():
    samples, _, _, _ = golden_samples(CASES[0])
    model = dataclasses.replace(ModelConfig(), freeze_vit=True)
    names = {sample.group for sample in samples}
    pictures = [piece.length - 2 for sample in samples for piece in sample.pieces if piece.kind == VIT]

    def total(**stored):
        costs = cost_model(model, **stored)
        return sum(map(costs.cost, samples))

    assert total() - total(stored_latents=names) == autoencoder_cost(samples, model) > 0
    assert total() - total(stored_features=names) == sum(vision_flops(model.vit, length) for length in pictures) > 0
    assert total(stored_latents=["another"]) == total()


def test_workers_get_the_same_costs_by_pickling():
    samples, _, _, _ = golden_samples(CASES[0])
    costs = cost_model(ModelConfig())
    assert list(map(pickle.loads(pickle.dumps(costs)).cost, samples)) == list(map(costs.cost, samples))
