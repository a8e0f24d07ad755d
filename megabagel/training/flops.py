"""Floating-point operations that one packed sequence needs, and what devices can do at best: the two halves of MFU.

Counts what the loss depends on: masked attention pairs, loss rows only in the heads, no padding. Left out: norms,
activations, the frozen autoencoder's encoding, recomputation.
"""

import torch

from megabagel.config.schema import ModelConfig
from megabagel.packing.plan import PackPlan

# Dense bf16 TFLOP/s, from the vendors' data sheets; the first name that the device's contains wins.
_PEAK_BF16 = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "L40": 181.0,
    "L4": 121.0,
}


def peak_tflops(device_name: str, params_dtype: str) -> float | None:
    """Dense peak of one device in TFLOP/s; None when the device is not in the table or the precision is not bf16."""
    if params_dtype != "bf16":
        return None
    return next((peak for name, peak in _PEAK_BF16.items() if name in device_name), None)


def pack_flops(plan: PackPlan, model: ModelConfig) -> float:
    """Forward and backward FLOPs of one pack. A multiply and an add count as two.

    Backward costs twice the forward: once for inputs, once for weights. Frozen parts skip what they do not need: a
    frozen ViT and, under freeze_und, the und stream run forward only; a frozen decoder needs no weight gradients.
    """
    decoder = 2 if model.freeze_llm else 3
    total = decoder_flops(plan, model)
    gen = plan.gen_index.numel()
    total += decoder * 2 * model.hidden_size * model.vocab_size * plan.ce_rows.numel()
    channels = model.latent_patch_size**2 * model.vae.z_channels
    total += 3 * 2 * model.hidden_size * channels * (gen + plan.mse_rows.numel())
    return float(total + _vision(plan, model))


def decoder_flops(plan: PackPlan, model: ModelConfig) -> float:
    """The decoder layers' part of `pack_flops`: linears and the visible part of attention."""
    gen_factor = 2 if model.freeze_llm else 3
    und_factor = 1 if model.freeze_und else gen_factor
    total = model.num_layers * (
        und_factor * plan.und_index.numel() * _linear_per_token(model, model.und_num_experts)
        + gen_factor * plan.gen_index.numel() * _linear_per_token(model, _gen_num_experts(model))
    )
    und_pairs, gen_pairs = _attention_pairs(plan)
    backward_attention = 1 if model.freeze_und else 3
    return float(total + 4 * model.hidden_size * model.num_layers * (backward_attention * und_pairs + 3 * gen_pairs))


def _gen_num_experts(model: ModelConfig) -> int | None:
    """Sparse experts that gen tokens choose from: und's where the streams share one MLP; None: a dense MLP."""
    return model.und_num_experts if model.layer_variant == "dense" else model.gen_num_experts


def _linear_per_token(model: ModelConfig, experts: int | None) -> int:
    """Forward FLOPs of a layer's projections for one token: QKV, output, and the gated MLP or the experts it passes."""
    head_dim = model.hidden_size // model.num_attention_heads
    width = model.hidden_size + 2 * model.num_query_groups * head_dim + model.hidden_size  # QKV, output
    if experts is None:
        width += 3 * model.ffn_hidden_size
    else:
        routed = model.moe_router_topk * (model.moe_ffn_hidden_size or model.ffn_hidden_size)
        width += 3 * (routed + (model.moe_shared_expert_intermediate_size or 0)) + experts
    return 2 * model.hidden_size * width


def _attention_pairs(plan: PackPlan) -> tuple[int, int]:
    """Visible (query, key) pairs of one layer, for problems of the und stream and for those with VAE tokens."""
    start, queries, _, prefix, causal = plan.problems.unbind(dim=1)
    pairs = queries * (prefix + queries) - causal * (queries * (queries - 1) // 2)
    gen = torch.zeros(plan.sequence_length + 1, dtype=torch.int64, device=pairs.device)
    gen[1:][plan.gen_index] = 1
    gen[1:] = gen[1:][plan.attention_index].cumsum(0)  # VAE tokens among the first rows in attention order
    is_gen = gen[start + queries] > gen[start]
    return int(pairs[~is_gen].sum()), int(pairs[is_gen].sum())


def _vision(plan: PackPlan, model: ModelConfig) -> float:
    """FLOPs of the ViT and the connector."""
    vit, tokens = model.vit, plan.vit_rows.numel()
    layer = 2 * (4 * vit.hidden_size**2 + 2 * vit.hidden_size * vit.ffn_hidden_size) * tokens
    layer += 4 * vit.hidden_size * int((plan.vit_seqlens.long() ** 2).sum())
    tower = vit.num_layers * layer + 2 * 3 * vit.patch_size**2 * vit.hidden_size * tokens
    connector = 2 * (vit.hidden_size * model.hidden_size + model.hidden_size**2) * tokens
    return (1 if model.freeze_vit else 3) * tower + (1 if model.freeze_und else 3) * connector
