"""Floating-point operations that one packed sequence needs, and what devices can do at best: the two halves of MFU.

Counts what the loss depends on: masked attention pairs, loss rows only in the heads, no padding. Left out: norms,
activations, recomputation.
"""

from collections.abc import Sequence

import torch

from megabagel.config.schema import ModelConfig
from megabagel.models.costs import autoencoder_flops
from megabagel.packing.plan import PackPlan
from megabagel.training.cost_model import cost_model

COMPONENTS = ("und_linears", "gen_linears", "attention", "vit", "vae", "connectors", "heads")

# Dense bf16 TFLOP/s, from the vendors' data sheets; the first name that the device's contains wins.
_PEAK_BF16 = {
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
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
    """Sum of `component_flops`, with every picture encoded."""
    return sum(component_flops(plan, model).values())


def component_flops(
    plan: PackPlan,
    model: ModelConfig,
    stored_latents: Sequence[bool] | None = None,
    stored_features: Sequence[bool] | None = None,
) -> dict[str, float]:
    """Forward and backward FLOPs of one pack by COMPONENTS; `cost_model` says what of each is counted.

    Linears and attention are those of the decoder's layers. `connectors`: everything on the way into the decoder that
    is neither ViT nor VAE. `vae`: encoding, forward only. `stored_latents`, `stored_features`: for each picture of the
    pack, in order, whether it comes encoded and costs nothing here; None: none does.
    """
    each = cost_model(model)
    und_pairs, gen_pairs = _attention_pairs(plan)
    patches = _kept(plan.vit_seqlens.tolist(), stored_features)
    side = model.latent_patch_size * model.vae.downsample
    pictures = _kept(plan.latent_grids.tolist(), stored_latents)
    values = {
        "und_linears": each.und_token * plan.und_index.numel(),
        "gen_linears": each.gen_token * plan.gen_index.numel(),
        "attention": each.und_pair * und_pairs + each.gen_pair * gen_pairs,
        "vit": sum(each.vit_token * n + each.vit_pair * n**2 for n in patches),
        "vae": sum(autoencoder_flops(model.vae, rows * side, columns * side) for rows, columns in pictures),
        "connectors": each.latent_token * plan.gen_index.numel() + each.connector_token * plan.vit_rows.numel(),
        "heads": each.ce_row * plan.ce_rows.numel() + each.mse_row * plan.mse_rows.numel(),
    }
    return {name: float(value) for name, value in values.items()}


def decoder_flops(plan: PackPlan, model: ModelConfig) -> float:
    """The decoder layers' part of `pack_flops`: linears and the visible part of attention."""
    parts = component_flops(plan, model)
    return parts["und_linears"] + parts["gen_linears"] + parts["attention"]


def official_flops(plan: PackPlan, model: ModelConfig) -> float:
    """Forward and backward FLOPs of one pack as BAGEL's own training script counts them.

    6 per token and weight of one stream's layers, of the embedding and of the vocabulary head; 12 per width, layer and
    pair of tokens of a sample, seen or not; encoders left out.
    """
    head_dim = model.hidden_size // model.num_attention_heads
    width = 2 * model.hidden_size + 2 * model.num_query_groups * head_dim + 3 * model.ffn_hidden_size
    weights = model.hidden_size * (model.num_layers * width + 2 * model.vocab_size)
    pairs = int(plan.sample_lens.square().sum())
    return float(6 * weights * plan.sequence_length + 12 * model.hidden_size * model.num_layers * pairs)


def _kept(values: list, left_out: Sequence[bool] | None) -> list:
    return values if left_out is None else [v for v, out in zip(values, left_out, strict=True) if not out]


def _attention_pairs(plan: PackPlan) -> tuple[int, int]:
    """Visible (query, key) pairs of one layer, for problems of the und stream and for those with VAE tokens."""
    start, queries, _, prefix, causal = plan.problems.unbind(dim=1)
    pairs = queries * (prefix + queries) - causal * (queries * (queries - 1) // 2)
    gen = torch.zeros(plan.sequence_length + 1, dtype=torch.int64, device=pairs.device)
    gen[1:][plan.gen_index] = 1
    gen[1:] = gen[1:][plan.attention_index].cumsum(0)  # VAE tokens among the first rows in attention order
    is_gen = gen[start + queries] > gen[start]
    return int(pairs[~is_gen].sum()), int(pairs[is_gen].sum())
