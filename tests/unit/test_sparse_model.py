"""A whole model with sparse experts on one process: upcycled from a dense folder, trained, frozen, from scratch."""

import dataclasses
import logging

import numpy as np
import pytest
import torch

from megabagel.checkpoint.hf import load_weights, open_source, stage_rules
from megabagel.checkpoint.names import export_shard
from megabagel.config.folder import read_model_config
from megabagel.config.schema import Config, ParallelConfig
from megabagel.models.build import build_stages
from megabagel.models.embeddings import StreamInputs
from megabagel.packing.geometry import SpecialTokens, geometry_of
from megabagel.packing.planner import build_plan
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import plan_sample
from megabagel.runtime import distributed
from megabagel.training.expert_losses import take_expert_losses
from megabagel.training.optimizer import build_optimizer
from megabagel.training.step import count, forward_backward
from megabagel.training.wrap import wrap
from tests.tiny_data import CHECKPOINT

SPARSE = {"und_num_experts": 2, "gen_num_experts": 4, "moe_shared_expert_intermediate_size": 24}


@pytest.fixture(scope="module")
def layout():
    yield distributed.initialize(ParallelConfig(), 0)
    distributed.destroy()


class Model:
    """The golden checkpoint's shape with changes, filled from it or from scratch, and one pack."""

    def __init__(
        self, layout, folder: str | None = str(CHECKPOINT), recompute: str | list | None = None, **changes: object
    ):
        self.config = Config()
        if recompute == "full":
            self.config.training.recompute_granularity = "full"
        elif recompute:
            self.config.training.recompute_granularity = "selective"
            self.config.training.recompute_modules = recompute
        self.config.training.params_dtype = "fp32"
        self.config.optimizer.lr = 1e-3
        self.config.parallel.overlap_grad_reduce = True  # a parameter outside the graph would stop the second step
        self.config.checkpoint.init_from = folder
        self.config.model = dataclasses.replace(read_model_config(str(CHECKPOINT), self.config.model), **changes)
        self.device = layout.device
        (self.stage,) = build_stages(self.config, layout.device)
        for parameter in self.stage.parameters():
            parameter.data.fill_(torch.nan)
        load_weights([self.stage], open_source(self.config))
        self.before = {name: p.detach().clone() for name, p in self.stage.named_parameters()}
        self.chunks = wrap([self.stage], self.config.parallel)
        self.optimizer = build_optimizer(self.config.optimizer, self.config.training, self.config.parallel, self.chunks)

    def pack(self):
        vae, vit = np.zeros((32, 32, 3), np.uint8), np.zeros((28, 28, 3), np.uint8)
        items = [
            Item("vae_image", pixels=vae),
            Item("vit_image", pixels=vit),
            Item("text", text_ids=[5, 6, 7], loss=True),
            Item("vae_image", pixels=vae, loss=True),
        ]
        model = self.config.model
        shape = geometry_of(model, SpecialTokens(501, 502, 503, 504))
        plan = build_plan([plan_sample(Sample(items, (0,), "test", "test"), shape, [False] * 4)], shape, tile=16)
        generator = torch.Generator().manual_seed(0)
        tokens, width = plan.gen_index.numel(), model.latent_patch_size**2 * model.vae.z_channels
        vit_values = torch.randn(plan.vit_rows.numel(), 3 * model.vit.patch_size**2, generator=generator)
        latents, noise = torch.randn(2, tokens, width, generator=generator)
        return plan, StreamInputs(vit_values, latents.flatten(), noise)

    def step(self) -> torch.Tensor:
        """Train one step -> ce, mse before it."""
        plan, inputs = self.pack()
        self.chunks[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        counts = count([plan], self.config.training, self.device)
        losses = forward_backward(self.chunks, [(plan, inputs)], counts, self.config.training, rows=0)
        self.optimizer.step()
        return torch.tensor([losses.ce, losses.mse])

    def moved(self) -> set[str]:
        return {name for name, p in self.stage.named_parameters() if not torch.equal(p, self.before[name])}


def test_upcycled_model_starts_as_the_dense_one_and_says_so_once(layout, caplog):
    with caplog.at_level(logging.WARNING):
        sparse = Model(layout, **SPARSE, moe_aux_loss_coeff=0.01)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "megabagel.checkpoint.hf"]
    assert "has dense MLPs: sparse experts start as copies of them, with new routers" in message
    dense = Model(layout)
    torch.testing.assert_close(sparse.step(), dense.step(), rtol=1e-6, atol=0)
    losses = take_expert_losses(sparse.chunks, sparse.config.model, 1, layout.device)
    sparse_streams = 2 * sparse.config.model.num_layers
    assert sparse_streams <= losses.balance < 2 * sparse_streams and losses.z > 0
    sparse.step()  # the shared experts' first projections wait for the last ones, which start at zero
    still = set(sparse.before) - sparse.moved()  # the pack is small: some experts have no token in it
    assert all(".mlp.experts." in name for name in still if not name.endswith("k_proj.bias"))
    moved = [name for name in sparse.moved() if "layers.0.gen.mlp.experts" in name and "linear_fc2" in name]
    assert len(moved) >= 2 and not torch.equal(*(sparse.stage.get_parameter(name) for name in moved[:2]))


@pytest.mark.parametrize("modules", [None, ["mlp"], ["layernorm"]])
def test_recomputed_layers_give_the_same_gradients_and_count_losses_once(modules, layout):
    found = []
    for recompute in (None, modules or "full"):
        model = Model(layout, recompute=recompute, **SPARSE, moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.1)
        model.step()
        losses = take_expert_losses(model.chunks, model.config.model, 1, layout.device)
        gradients = [parameter.main_grad for parameter in model.stage.parameters()]
        assert sum(bool(gradient.any()) for gradient in gradients) > 0.8 * len(gradients)
        found.append([torch.tensor([losses.balance, losses.z]), *gradients])
    for plain, recomputed in zip(*found, strict=True):
        assert (recomputed - plain).norm() <= 1e-5 * plain.norm() + 1e-9


def test_dense_models_measure_no_expert_losses(layout):
    model = Model(layout)
    assert take_expert_losses(model.chunks, model.config.model, 1, layout.device).balance is None


def test_experts_of_a_frozen_decoder_stay(layout):
    model = Model(layout, **SPARSE, freeze_llm=True, moe_aux_loss_coeff=0.01)
    assert model.step().isfinite().all()
    assert model.moved() and not any(name.startswith("decoder.") for name in model.moved())


def test_frozen_und_experts_stay_and_gen_experts_move(layout):
    model = Model(layout, **SPARSE, freeze_und=True, moe_aux_loss_coeff=0.01)
    model.step()
    model.step()
    moved = {name for name in model.moved() if name.startswith("decoder.") and ".mlp." in name}
    assert {f"decoder.layers.0.gen.mlp.{part}.weight" for part in ("router", "shared_experts.linear_fc1")} <= moved
    assert any(".gen.mlp.experts." in name for name in moved) and not any(".und." in name for name in moved)


@pytest.mark.parametrize("variant", ["mot", "moe", "dense"])
def test_experts_from_scratch_have_released_names_and_differ(layout, variant):
    changes = {**SPARSE, "gen_num_experts": None} if variant == "dense" else SPARSE
    model = Model(layout, folder=None, layer_variant=variant, **changes)
    rules = stage_rules(model.stage)
    exported = {
        name: tensor
        for parameter, value in model.before.items()
        for name, (tensor, _) in export_shard(value, rules[parameter]).items()
    }
    mlp = "language_model.model.layers.0.mlp"
    first, second = (exported[f"{mlp}.experts.{e}.up_proj.weight"] for e in range(2))
    assert not torch.equal(first, second)
    assert exported[f"{mlp}.gate.weight"].shape == (2, model.config.model.hidden_size)
    assert (f"{mlp}_moe_gen.experts.3.down_proj.weight" in exported) is (variant != "dense")
    assert model.step().isfinite().all()
