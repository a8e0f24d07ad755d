"""Sparse experts on one process: the same maths in plain PyTorch, auxiliary losses, and unusual loads."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megabagel.config.schema import Config, ModelConfig, ParallelConfig, TrainingConfig
from megabagel.models.build import transformer_config
from megabagel.models.expert_mark import is_expert
from megabagel.models.expert_router import PackRouter
from megabagel.models.sparse_experts import SparseMLP, sparse_submodules
from megabagel.runtime import distributed
from tests.sparse_reference import sparse_mlp

from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip  after the adapter
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # isort: skip

HIDDEN, ROWS, PADDING = 16, 32, 5
MODEL = ModelConfig(
    hidden_size=HIDDEN, num_layers=2, num_attention_heads=2, num_query_groups=2, ffn_hidden_size=24, moe_router_topk=2,
    moe_aux_loss_coeff=0.3, moe_z_loss_coeff=0.1, moe_ffn_hidden_size=20, moe_shared_expert_intermediate_size=12,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def layout():
    yield distributed.initialize(ParallelConfig(), 0)
    distributed.destroy()


@pytest.fixture(autouse=True)
def scale():
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))


def build(dtype: str = "fp32", experts: int = 4, **model: object) -> SparseMLP:
    shape = dataclasses.replace(MODEL, **model)
    config = transformer_config(Config(shape, training=TrainingConfig(params_dtype=dtype)))
    mlp = SparseMLP(config, experts, shape, ProcessGroupCollection.use_mpu_process_groups())
    generator = torch.Generator().manual_seed(1)
    for parameter in mlp.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return mlp


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(ROWS, 1, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.arange(ROWS) >= ROWS - PADDING


def gradients(mlp: SparseMLP, hidden: Tensor) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in mlp.named_parameters()} | {"hidden": hidden.grad}
    hidden.grad = None
    mlp.zero_grad()
    return found


def test_output_losses_and_gradients_equal_plain_pytorch():
    mlp, (hidden, padding) = build(), rows()
    probe = torch.randn(ROWS, 1, HIDDEN, generator=torch.Generator().manual_seed(3))
    probe[padding] = 0  # as in training: no loss looks at padding rows
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(0.25))
    out, _ = mlp(hidden, padding)
    (out * probe).sum().backward()
    found, measured = gradients(mlp, hidden), mlp.router.take_measured()
    expected, balance, z = sparse_mlp(dict(mlp.named_parameters()), hidden[:, 0], padding, MODEL.moe_router_topk)
    expected = expected[:, None]
    ((expected * probe).sum() + 0.25 * (0.3 * balance + 0.1 * z)).backward()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(measured, torch.stack([balance, z]), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(mlp, hidden).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    assert found["router.weight"].abs().max() > 1e-3


def test_weights_of_the_chosen_experts_sum_to_one():
    mlp, (hidden, padding) = build(), rows()
    weights, chosen = mlp.router(hidden, padding[:, None])
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(ROWS))
    assert (chosen.sum(dim=1) == 2).all() and (weights[~chosen] == 0).all()


def test_padding_rows_enter_no_auxiliary_loss():
    mlp, (hidden, padding) = build(), rows()
    mlp(hidden, padding)[0].sum().backward()
    measured = mlp.router.take_measured()
    other = hidden.detach().clone()
    other[padding] = 7.0
    mlp(other, padding)
    torch.testing.assert_close(mlp.router.take_measured(), measured)
    assert mlp.router.take_measured() is None


def test_a_pack_without_a_token_of_the_stream_has_no_loss_and_finite_gradients():
    mlp, (hidden, _) = build(), rows()
    (mlp(hidden, torch.ones(ROWS, dtype=torch.bool))[0] * 0).sum().backward()
    assert mlp.router.take_measured().tolist() == [0, 0]
    assert all(not gradient.any() for gradient in gradients(mlp, hidden).values())


@pytest.mark.parametrize("experts", [3, 8])
def test_experts_that_no_row_chooses_have_a_gradient_of_zero(experts):
    mlp, (hidden, padding) = build(experts=experts), rows()
    with torch.no_grad():
        hidden.abs_()
        mlp.router.weight.fill_(-1)
        mlp.router.weight[:2] = 1
    mlp(hidden, padding)[0].sum().backward()
    for e, expert in enumerate(mlp.experts.local_experts):
        assert bool(expert.linear_fc1.weight.grad.any()) is (e < 2)


def test_recomputation_counts_losses_once():
    mlp, (hidden, padding) = build(), rows()
    mlp(hidden, padding)[0].sum().backward()
    expected, plain = mlp.router.take_measured(), gradients(mlp, hidden)
    out, _ = torch.utils.checkpoint.checkpoint(mlp, hidden, padding, use_reentrant=True)
    out.sum().backward()
    torch.testing.assert_close(mlp.router.take_measured(), expected)
    for name, gradient in gradients(mlp, hidden).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_bf16_is_close_to_fp32_and_routes_in_float32():
    mlp, (hidden, padding) = build("bf16"), rows(torch.bfloat16)
    out, _ = mlp(hidden, padding)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and all(p.grad.isfinite().all() for p in mlp.parameters())
    assert mlp.router.take_measured().dtype == torch.float32
    exact = build().to(torch.float32)
    for mine, theirs in zip(exact.parameters(), mlp.parameters(), strict=True):
        mine.data.copy_(theirs)
    expected, _ = exact(hidden.float(), padding)
    assert (out - expected).abs().max() < 2e-2 * expected.abs().max()


def test_only_routed_experts_are_marked():
    marked = {name.split(".")[0] for name, parameter in build().named_parameters() if is_expert(parameter)}
    assert marked == {"experts"}
    assert {n.split(".")[0] for n, p in build().named_parameters() if not is_expert(p)} == {"router", "shared_experts"}


def test_grouped_products_come_from_transformer_engine():
    from megatron.core.extensions import transformer_engine

    submodules = sparse_submodules("transformer_engine")
    assert submodules.experts.module == ("megatron.core.transformer.moe.experts", "TEGroupedMLP")
    for linear in (submodules.experts.submodules.linear_fc1, submodules.experts.submodules.linear_fc2):
        module, name = linear.module
        assert module == transformer_engine.__name__ and hasattr(transformer_engine, name)
    assert submodules.router is PackRouter
    assert sparse_submodules("local").experts.module[1] == "SequentialMLP"
