"""Recomputation keeps less for the backward pass and gives the same gradients."""

import pytest
import torch
from torch import Tensor

from megabagel.checkpoint.hf import load_weights, open_source
from megabagel.config.schema import ParallelConfig
from megabagel.models.build import build_stages
from megabagel.models.embeddings import StreamInputs
from megabagel.packing.geometry import geometry_of
from megabagel.runtime import distributed
from tests.distributed.layouts.packs import SPECIAL, make_pack
from tests.distributed.layouts.run import tiny_config

SETTINGS = {
    "full": {"recompute_granularity": "full"},
    "first layers only": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "norms": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    "attention, mlp and norms": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "mlp", "layernorm"],
    },
    "vit": {"recompute_vit": True},
}


def run(settings: dict) -> tuple[int, dict[str, Tensor]]:
    """Bytes of activations that a forward pass keeps, and the gradients by parameter."""
    config = tiny_config({f"training.{name}": value for name, value in settings.items()})
    (stage,) = build_stages(config, torch.device("cpu"))
    load_weights([stage], open_source(config))
    plan = make_pack("one long sample", (0, 0), geometry_of(config.model, SPECIAL), tile=16, total_length=None).plan
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(plan.vit_rows.numel(), 3 * config.model.vit.patch_size**2, generator=generator)
    channels = config.model.latent_patch_size**2 * config.model.vae.z_channels
    latents, noise = torch.randn(2, plan.gen_index.numel(), channels, generator=generator)
    weights = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        losses = stage(plan, StreamInputs(patches, latents.flatten(), noise))
    # what is recomputed may have been saved first and emptied later
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in saved)}
    kept = sum(size for pointer, size in storages.items() if pointer not in weights)
    (losses.ce + losses.mse).backward()
    return kept, {name: parameter.grad for name, parameter in stage.named_parameters() if parameter.grad is not None}


@pytest.fixture(scope="module")
def everything_kept():
    distributed.initialize(ParallelConfig(), 0)
    yield run({})
    distributed.destroy()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_less_is_kept_and_gradients_are_the_same(settings, everything_kept):
    kept, gradients = run(settings)
    assert kept < everything_kept[0]
    assert gradients.keys() == everything_kept[1].keys()
    for name, gradient in gradients.items():
        expected = everything_kept[1][name]  # recomputation may only change the order in which gradients are summed
        assert (gradient - expected).norm() <= 1e-5 * expected.norm() + 1e-6, name


def test_full_recomputation_keeps_least(everything_kept):
    kept = {name: run(SETTINGS[name])[0] for name in ("full", "first layers only", "attention, mlp and norms")}
    assert kept["full"] < kept["first layers only"] < everything_kept[0]
    assert kept["full"] < kept["attention, mlp and norms"]
