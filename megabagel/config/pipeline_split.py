"""How many decoder layers each pipeline stage gets: evenly, with other ends, or so that all take equal time (`auto`).

The last counts floating-point operations of a typical token; nothing is measured, and no megatron-core is needed.
"""

from dataclasses import dataclass

from megabagel.config.schema import DataConfig, ModelConfig, ParallelConfig

_TIME_CHANNELS = 256  # of the sinusoid that the timestep embedder reads


@dataclass(frozen=True)
class TokenMix:
    """What a hundred tokens of a pack are, and how much they attend to.

    The default is BAGEL's fine-tuning recipe, one sample of each kind with the largest pictures it allows: text to
    image (4096 VAE tokens), an edit (1369 ViT and 2 x 4096 VAE tokens), a question about a picture (4900 ViT tokens and
    500 of text, half of them an answer). The packs of a run differ; a split that followed every data file would make
    the layout of a run depend on its data.
    """

    vit: int = 33
    vae: int = 63
    ce: int = 2  # tokens that the vocabulary head reads
    mse: int = 42  # tokens that the latent head reads
    keys: int = 6000  # that a token sees, at most as many as a pack holds
    patches: int = 4096  # of a ViT picture, at most as many as the position table holds


RECIPE = TokenMix()


def stage_layers(model: ModelConfig, data: DataConfig | None, parallel: ParallelConfig) -> list[int]:
    """Decoder layers of every virtual stage in the order of the layers: of all ranks' first chunks, then their second.

    The configuration must be legal (`checks_parallel.py`).
    """
    pp, vp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if parallel.pipeline_split == "auto":
        return split_layers(model, data, pp * vp)
    ends = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    rest = model.num_layers - sum(end or 0 for end in ends)
    others = pp - sum(end is not None for end in ends)
    per_rank = [rest // max(others, 1)] * pp
    if ends[0] is not None:
        per_rank[0] = ends[0]
    if ends[1] is not None:
        per_rank[-1] = ends[1]
    return [layers // vp for layers in per_rank] * vp


def is_legal_split(layers: int, pp: int, vp: int | None, first: int | None, last: int | None) -> bool:
    """Whether ranks can hold `layers` evenly but for the first and last rank's numbers, each in `vp` equal chunks."""
    vp = vp or 1
    ends = [end for end in (first, last) if end is not None]
    rest, others = layers - sum(ends), pp - len(ends)
    if any(end < 1 or end % vp for end in ends) or others < 0:
        return False
    return rest == 0 if others == 0 else rest > 0 and rest % (others * vp) == 0


def split_layers(model: ModelConfig, data: DataConfig | None, stages: int, mix: TokenMix = RECIPE) -> list[int]:
    """Decoder layers of each stage in the order of the layers, at least one each; `stages` counts virtual stages too.

    Of all splits it takes the one whose most expensive stage costs least, then the most even one (smallest sum of
    squares), then the one with fewer layers in the earlier stages, which hold more micro-batches' activations. The
    first stage also pays for the embeddings and for a trained ViT, the last one for the heads. `data`: the size of
    packs; None: that of the default configuration. Raises ValueError when there are fewer layers than stages.
    """
    layers = model.num_layers
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot be split over {stages} stages: each needs at least one")
    if stages == 1:
        return [layers]
    layer, first_extra, last_extra = stage_costs(model, data, mix)
    best = None
    for first in range(1, layers - stages + 2):
        # the layers between the ends are all alike: spread evenly, the remainder on the later stages
        ends = [layers - first] if stages == 2 else range(1, layers - first - stages + 3)
        for last in ends:
            counts = [first, *_spread(layers - first - last, stages - 2), last]
            costs = [count * layer for count in counts]
            costs[0] += first_extra
            costs[-1] += last_extra
            candidate = max(costs), sum(cost**2 for cost in costs), counts
            best = candidate if best is None else min(best, candidate)
    return best[2]


def _spread(layers: int, stages: int) -> list[int]:
    """`layers` over `stages` as evenly as possible, in ascending order."""
    return [(layers + stage) // stages for stage in range(stages)]


def megatron_layout(layers: list[int]) -> list[list[str]]:
    """megatron-core's `pipeline_model_parallel_layout` of stages with these numbers of decoder layers.

    One list per virtual stage in the order of the layers, which is also megatron-core's: all ranks' first chunks, then
    all ranks' second ones.
    """
    layout = [["decoder"] * count for count in layers]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def stage_costs(model: ModelConfig, data: DataConfig | None, mix: TokenMix = RECIPE) -> tuple[int, int, int]:
    """Forward and backward FLOPs of a hundred tokens: one decoder layer, what the first stage does besides, the last.

    Backward costs the forward once for inputs and once for weights, where they are trained. Recomputation is left out,
    as are norms, activations and what the encode phase does before the pipeline (autoencoder, frozen ViT). Every matrix
    is split over the tensor and context ranks alike, so their numbers do not matter.
    """
    data = data or DataConfig()
    hidden = model.hidden_size
    und, gen = _passes(model)
    attention = 4 * hidden * min(mix.keys, data.expected_num_tokens)
    layer = (100 - mix.vae) * und * (_linear(model, model.und_num_experts) + attention)
    layer += mix.vae * gen * (_linear(model, model.gen_num_experts) + attention)

    channels = model.latent_patch_size**2 * model.vae.z_channels
    first = last = 0
    if model.visual_und:
        connector = 2 * (model.vit.hidden_size * hidden + hidden**2)
        first += mix.vit * (1 if model.freeze_und else 3) * connector
        if not (model.freeze_vit or model.freeze_und):
            first += mix.vit * 3 * _vision_tower(model, mix)
    if model.visual_gen:
        first += mix.vae * 3 * 2 * (channels * hidden + _TIME_CHANNELS * hidden + hidden**2)
        last += mix.mse * 3 * 2 * hidden * channels
    last += mix.ce * (2 if model.freeze_llm else 3) * 2 * hidden * model.vocab_size
    return layer, first, last


def _passes(model: ModelConfig) -> tuple[int, int]:
    """How often a layer's forward work is done in all, und and gen: forward, input gradients, weight gradients."""
    trained = 2 if model.freeze_llm else 3
    return (1 if model.freeze_und else trained), trained


def _linear(model: ModelConfig, experts: int | None) -> int:
    """Forward FLOPs of a layer's projections for one token of a stream with so many sparse experts (None: dense)."""
    head_dim = model.hidden_size // model.num_attention_heads
    qkv = model.hidden_size * (model.hidden_size + 2 * model.num_query_groups * head_dim)
    ffn = model.ffn_hidden_size
    if experts is not None:
        ffn = model.moe_router_topk * (model.moe_ffn_hidden_size or model.ffn_hidden_size)
        ffn += model.moe_shared_expert_intermediate_size or 0
    return 2 * (qkv + model.hidden_size**2 + 3 * model.hidden_size * ffn)


def _vision_tower(model: ModelConfig, mix: TokenMix) -> int:
    """Forward FLOPs of the ViT for one of its tokens."""
    vit = model.vit
    attention = 4 * vit.hidden_size * min(mix.patches, vit.max_num_patch_per_side**2)
    layer = 2 * (4 * vit.hidden_size**2 + 2 * vit.hidden_size * vit.ffn_hidden_size) + attention
    return vit.num_layers * layer + 2 * 3 * vit.patch_size**2 * vit.hidden_size
