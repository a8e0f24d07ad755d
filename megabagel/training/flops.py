"""Floating-point operations that one packed sequence needs, and what devices can do at best: the two halves of MFU.

Counts what the loss depends on: masked attention pairs, loss rows only in the heads, no padding. Left out: norms,
activations, the frozen autoencoder's encoding, recomputation.
"""

import torch

from megabagel.config.schema import ModelConfig
from megabagel.packing.plan import PackPlan
from megabagel.training.cost_model import cost_model

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
    """Forward and backward FLOPs of one pack; `cost_model` says what of each part is counted."""
    each = cost_model(model)
    total = decoder_flops(plan, model)
    total += each.ce_row * plan.ce_rows.numel() + each.mse_row * plan.mse_rows.numel()
    total += each.latent_token * plan.gen_index.numel()
    total += (each.connector_token + each.vit_token) * plan.vit_rows.numel()
    return float(total + each.vit_pair * int((plan.vit_seqlens.long() ** 2).sum()))


def decoder_flops(plan: PackPlan, model: ModelConfig) -> float:
    """The decoder layers' part of `pack_flops`: linears and the visible part of attention."""
    each = cost_model(model)
    und_pairs, gen_pairs = _attention_pairs(plan)
    linears = each.und_token * plan.und_index.numel() + each.gen_token * plan.gen_index.numel()
    return float(linears + each.und_pair * und_pairs + each.gen_pair * gen_pairs)


def _attention_pairs(plan: PackPlan) -> tuple[int, int]:
    """Visible (query, key) pairs of one layer, for problems of the und stream and for those with VAE tokens."""
    start, queries, _, prefix, causal = plan.problems.unbind(dim=1)
    pairs = queries * (prefix + queries) - causal * (queries * (queries - 1) // 2)
    gen = torch.zeros(plan.sequence_length + 1, dtype=torch.int64, device=pairs.device)
    gen[1:][plan.gen_index] = 1
    gen[1:] = gen[1:][plan.attention_index].cumsum(0)  # VAE tokens among the first rows in attention order
    is_gen = gen[start + queries] > gen[start]
    return int(pairs[~is_gen].sum()), int(pairs[is_gen].sum())
