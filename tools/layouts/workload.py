"""The model and the packs that measure_layouts.py trains: small, in the proportions of BAGEL-7B, no files needed.

Every pack pads to the same number of rows in every layout of up to 8 tensor x context ranks, so that layouts compare.
"""

import numpy as np
import torch

from layouts.traffic_formula import Load
from megabagel.config.autoencoder import AutoencoderConfig
from megabagel.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig, VisionConfig
from megabagel.data.pack import Pack
from megabagel.packing.geometry import Geometry, SpecialTokens, geometry_of
from megabagel.packing.planner import build_plan
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import PlannedSample, plan_sample

STREAM_ROWS = 256  # padded, of each stream of a pack
LOAD = Load(STREAM_ROWS, STREAM_ROWS, 1, vit_tokens=128, ce_rows=27, mse_rows=161)  # one pack of `_samples`
TILE = 16


def small_config(packs: int = 8) -> Config:
    """bf16, MLPs 5.5 times as wide as the model (BAGEL-7B-MoT: 5.3), two query heads per key head; `packs` a step."""
    return Config(
        model=ModelConfig(
            hidden_size=128,
            num_layers=8,
            num_attention_heads=8,
            num_query_groups=4,
            ffn_hidden_size=704,
            vocab_size=2048,
            max_latent_size=16,
            vit=VisionConfig(64, 2, 4, 256, patch_size=14, max_num_patch_per_side=16),
            vae=AutoencoderConfig(ch=16, ch_mult=(1, 1, 1, 1), num_res_blocks=1, num_groups=8),
        ),
        data=DataConfig(max_num_tokens=2 * STREAM_ROWS - 2),
        optimizer=OptimizerConfig(lr=1e-3, lr_warmup_steps=0),
        training=TrainingConfig(global_batch_size=packs),
    )


def _picture(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def _samples(number: int) -> list[Sample]:
    """A picture to paint, an edit and a question about a picture: 242 rows of the gen stream, 251 of und."""
    generator = np.random.default_rng(number)

    def text(length: int, **options: object) -> Item:
        return Item("text", text_ids=generator.integers(10, 2000, length).tolist(), **options)

    def image(kind: str, height: int, width: int, **options: object) -> Item:
        return Item(kind, pixels=_picture(generator, height, width), **options)

    paint = [text(26), image("vae_image", 160, 128, loss=True)]
    edit = [
        image("vae_image", 144, 144),
        image("vit_image", 112, 112),
        text(25),
        image("vae_image", 144, 144, loss=True),
    ]
    answer = [image("vit_image", 112, 112), text(26), text(26, loss=True)]
    return [Sample(items, (number, i), "synthetic", "synthetic") for i, items in enumerate((paint, edit, answer))]


def _pixels(pictures: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(picture).permute(2, 0, 1).contiguous() for picture in pictures]


def make_packs(config: Config, replica: int, replicas: int) -> list[Pack]:
    """This replica's packs of the step; together the replicas have the same packs in every layout."""
    geometry: Geometry = geometry_of(config.model, SpecialTokens(1, 2, 3, 4))
    tile = TILE * config.parallel.tensor_model_parallel_size * config.parallel.context_parallel_size
    total = 2 * STREAM_ROWS if config.parallel.pipeline_model_parallel_size > 1 else None
    packs = []
    for number in range(replica, config.training.global_batch_size, replicas):
        samples: list[PlannedSample] = [plan_sample(sample, geometry) for sample in _samples(number)]
        plan = build_plan(samples, geometry, tile, total)
        vae = [pixels for sample in samples for pixels in sample.vae_pixels]
        vit = [pixels for sample in samples for pixels in sample.vit_pixels]
        origins = [sample.origin for sample in samples]
        packs.append(Pack(plan, _pixels(vae), _pixels(vit), origins, [s.key for s in samples], origins))
    return packs
