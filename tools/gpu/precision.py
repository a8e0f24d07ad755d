"""A small decoder on Transformer Engine's linears, in BF16 and every FP8 recipe that this GPU has, against the same
weights in float32 on megatron-core's own."""

import dataclasses
import re

import torch
from baseline.decoders import TwoStreams, step
from baseline.mix import mixed_plan
from torch import Tensor

from gpu.report import Report, Skipped
from megabagel.config.precision import BF16_TILE, RECIPES
from megabagel.config.schema import Config, KernelConfig, ModelConfig, ParallelConfig, TrainingConfig
from megabagel.models.precision import probe
from megabagel.packing.plan import PackPlan
from megabagel.runtime import distributed

# largest relative difference (L2) of outputs and of the input's gradient
BF16, FP8 = 2e-2, 0.15
MODEL = ModelConfig(hidden_size=512, num_layers=3, num_attention_heads=8, num_query_groups=2, ffn_hidden_size=1536)
_FUSED = {
    r"input_layernorm\.weight": "linear_qkv.layer_norm_weight",
    r"pre_mlp_layernorm\.weight": "mlp.linear_fc1.layer_norm_weight",
}


def _decoder(kernels: KernelConfig, dtype: str, plan: PackPlan, device: torch.device) -> TwoStreams:
    model = dataclasses.replace(MODEL)
    config = Config(model=model, training=TrainingConfig(params_dtype=dtype), kernels=kernels)
    return TwoStreams(config, plan, device)


def copy_weights(source: TwoStreams, target: TwoStreams) -> None:
    """By name; norms may be part of the linears behind them."""
    weights, names = dict(source.named_parameters()), set(dict(target.named_parameters()))
    for name, value in weights.items():
        fused = name
        for pattern, inside in _FUSED.items():
            fused = re.sub(pattern, inside, fused)
        found = name if name in names else fused
        target.get_parameter(found).data.copy_(value.data)
        names.remove(found)
    if names:
        raise RuntimeError(f"the other decoder has no {sorted(names)[0]}")


def difference(decoder: TwoStreams, x: Tensor, grad: Tensor, expected: tuple[Tensor, Tensor]) -> float:
    """Largest relative difference of output and input gradient from the expected ones."""
    dtype = next(decoder.parameters()).dtype
    inputs = x.detach().to(dtype).requires_grad_()
    out = step(decoder, inputs, grad.to(dtype))
    pairs = zip((out.detach(), inputs.grad), expected, strict=True)
    return max(float((found.double() - value.double()).norm() / value.double().norm()) for found, value in pairs)


def run(report: Report, device: torch.device) -> None:
    capability = probe()
    distributed.initialize(ParallelConfig(), 0)
    plan = mixed_plan(2000, area=144)
    exact = _decoder(KernelConfig(transformer_impl="local"), "fp32", plan, device)
    draw = torch.Generator(device).manual_seed(2)
    x, grad = (torch.randn(plan.sequence_length, MODEL.hidden_size, generator=draw, device=device) for _ in range(2))
    out = step(exact, x.requires_grad_(), grad)
    expected = out.detach(), x.grad.clone()

    def check(name: str, kernels: KernelConfig, tolerance: float) -> None:
        report.begin(name)
        decoder = _decoder(kernels, "bf16", plan, device)
        copy_weights(exact, decoder)
        error = difference(decoder, x, grad, expected)
        report.row(name, error <= tolerance, error=float(f"{error:.2g}"), tolerance=tolerance)

    check("local bf16", KernelConfig(transformer_impl="local"), BF16)
    if capability.lacking:
        raise Skipped(f"Transformer Engine cannot run here: {capability.lacking}.")
    check("Transformer Engine bf16", KernelConfig(transformer_impl="transformer_engine"), BF16)
    for name, recipe in RECIPES.items():
        if not recipe.runs_on(capability.compute, capability.cuda):
            report.skip(f"FP8 recipe {name} does not run on this GPU.")
        elif recipe.alignment != BF16_TILE:
            report.skip(f"FP8 recipe {name} needs tiles of {recipe.alignment} rows, this pack has {BF16_TILE}.")
        else:
            check(f"FP8 {name}", KernelConfig("transformer_engine", fp8="hybrid", fp8_recipe=name), FP8)
