"""What the packs of a step hold and cost, counted from their plans: tokens by modality, padding, FLOPs.

No tensor of the model is looked at. Sums over data-parallel ranks are made in `step.count`.
"""

from collections.abc import Sequence

from megabagel.config.schema import ModelConfig, ParallelConfig
from megabagel.data.handout import is_stored
from megabagel.data.pack import Pack
from megabagel.training.flops import COMPONENTS, component_flops, official_flops

OFFICIAL = "flops/official"
ROWS = "rows"  # of both streams, padding included


def content_of(packs: Sequence[Pack], model: ModelConfig) -> list[dict[str, float]]:
    """Of each pack: `tokens/MODALITY`, ROWS, `flops/COMPONENT` and OFFICIAL, by the same names."""
    return [_content(pack, model) for pack in packs]


def _content(pack: Pack, model: ModelConfig) -> dict[str, float]:
    plan = pack.plan
    noised = plan.mse_rows.numel()
    flops = component_flops(
        plan,
        model,
        [is_stored(image.shape) for image in pack.vae_images],
        [is_stored(image.shape) for image in pack.vit_images],
    )
    return {
        "tokens/text": plan.text_rows.numel(),
        "tokens/vit": plan.vit_rows.numel(),
        "tokens/vae_clean": plan.gen_index.numel() - noised,
        "tokens/vae_noised": noised,
        ROWS: plan.und_length + plan.gen_length,
        **{f"flops/{name}": flops[name] for name in COMPONENTS},
        OFFICIAL: official_flops(plan, model),
    }


def padding_share(content: dict[str, float]) -> float:
    """Rows of the streams that hold no token, of all rows."""
    tokens = sum(value for name, value in content.items() if name.startswith("tokens/"))
    return 1 - tokens / content[ROWS]


def total_flops(content: dict[str, float]) -> float:
    """Of all components."""
    return sum(content[f"flops/{name}"] for name in COMPONENTS)


def bubble_share(flops: Sequence[float], parallel: ParallelConfig) -> float:
    """Estimate of the time that a stage of the pipeline waits, as a share of the step's, from the packs' FLOPs.

    Stages of equal work under 1F1B: (p - 1) of the heaviest pack's passes, cut by v when interleaved, are waited for on
    top of all packs' own. With equal packs this is (p - 1) / (v m + p - 1) of Narayanan et al., arXiv:2104.04473.
    """
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    waited = (stages - 1) * max(flops) / chunks
    return waited / (sum(flops) + waited)
