"""The FLOPs of each unit of a model's work: one token, one attention pair, one loss row, one patch.

The only place that knows the layers' matrices; `flops.py` multiplies it by a pack's counts, balanced packing by a
sample's.
"""

from collections.abc import Collection

from megabagel.config.schema import ModelConfig
from megabagel.models.costs import autoencoder_flops, vision_flops
from megabagel.packing.cost import CostModel


def cost_model(
    model: ModelConfig, stored_latents: Collection[str] = (), stored_features: Collection[str] = ()
) -> CostModel:
    """Forward and backward FLOPs per unit. A multiply and an add count as two; norms and activations are left out.

    Backward costs twice the forward: once for inputs, once for weights. Frozen parts skip what they do not need: the
    autoencoder, a frozen ViT and, under freeze_und, the und stream run forward only; a frozen decoder needs no weight
    gradients. `stored_latents`, `stored_features`: groups of data whose pictures are encoded already.
    """
    hidden, layers = model.hidden_size, model.num_layers
    trained = 2 if model.freeze_llm else 3
    vit_trained = 1 if model.freeze_vit else 3
    pair = 4 * hidden * layers
    latent_projection = 2 * hidden * model.latent_patch_size**2 * model.vae.z_channels
    vit_pair, vit_token = _quadratic(vision_flops(model.vit, 1), vision_flops(model.vit, 2))
    side = model.vae.downsample
    pixel_pair, pixel = _quadratic(
        autoencoder_flops(model.vae, side, side), autoencoder_flops(model.vae, side, 2 * side)
    )
    return CostModel(
        und_token=(1 if model.freeze_und else trained) * layers * _linear_per_token(model, model.und_num_experts),
        gen_token=trained * layers * _linear_per_token(model, _gen_num_experts(model)),
        und_pair=(1 if model.freeze_und else 3) * pair,
        gen_pair=3 * pair,
        ce_row=trained * 2 * hidden * model.vocab_size,
        mse_row=3 * latent_projection,
        latent_token=3 * latent_projection,
        connector_token=(1 if model.freeze_und else 3) * 2 * (model.vit.hidden_size * hidden + hidden**2),
        vit_token=vit_trained * vit_token,
        vit_pair=vit_trained * vit_pair,
        latent_pixel=pixel,
        latent_pixel_pair=pixel_pair,
        latent_pixels_per_token=model.latent_patch_size**2,
        stored_latents=frozenset(stored_latents),
        stored_features=frozenset(stored_features),
    )


def _quadratic(of_one: int, of_two: int) -> tuple[int, int]:
    """The coefficients (a, b) of the cost a n^2 + b n, from its values at 1 and 2."""
    square = (of_two - 2 * of_one) // 2
    return square, of_one - square


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
