"""How pictures become grids of tokens: strides, sides of the position tables and the ids of the special tokens.

Numbers and the one position rule of BAGEL; it knows nothing of samples, packs or models.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from megabagel.config.schema import ModelConfig


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that frame texts and images."""

    bos: int  # <|im_start|>
    eos: int  # <|im_end|>
    start_of_image: int  # <|vision_start|>
    end_of_image: int  # <|vision_end|>


@dataclass(frozen=True)
class Geometry:
    """What the packer must know of the model."""

    latent_stride: int  # pixels per side of one VAE token: autoencoder downsample * latent patch
    max_latent_size: int  # side of the latent position table
    vit_patch_size: int  # pixels per side of one ViT token
    vit_max_num_patch_per_side: int  # side of the ViT position tables
    special_tokens: SpecialTokens
    interpolate_pos: bool = False  # squeeze any grid into the whole table instead of using its upper left corner

    def stride(self, kind: str) -> int:
        """Pixels per token side for `vit_image` or `vae_image`."""
        return self.vit_patch_size if kind == "vit_image" else self.latent_stride

    def table_side(self, kind: str) -> int:
        """Side of the position table for `vit_image` or `vae_image`."""
        return self.vit_max_num_patch_per_side if kind == "vit_image" else self.max_latent_size


def geometry_of(model: ModelConfig, special_tokens: SpecialTokens) -> Geometry:
    """The packer's view of a model and its tokenizer. Raises ValueError when they do not belong together."""
    largest = max(vars(special_tokens).values())
    if largest >= model.vocab_size:
        raise ValueError(
            f"the tokenizer's frame tokens have ids up to {largest}, but model.vocab_size is {model.vocab_size}; "
            f"set it to at least {largest + 1} or use the tokenizer that belongs to the model"
        )
    return Geometry(
        latent_stride=model.vae.downsample * model.latent_patch_size,
        max_latent_size=model.max_latent_size,
        vit_patch_size=model.vit.patch_size,
        vit_max_num_patch_per_side=model.vit.max_num_patch_per_side,
        special_tokens=special_tokens,
        interpolate_pos=model.interpolate_pos,
    )


@lru_cache(maxsize=4096)
def fractional_buckets(length: int, table_side: int) -> np.ndarray:
    """Bucket of each of `length` patches in a table side, int64 [length]. float32 as in the reference: which bucket a
    coordinate on a boundary falls into depends on the rounding."""
    coordinates = torch.arange(0, 1 - 1e-6, 1 / length)
    boundaries = torch.arange(1 / table_side, 1.0, 1 / table_side)
    return torch.bucketize(coordinates, boundaries, right=True).numpy()


@lru_cache(maxsize=1024)
def grid_position_ids(rows: int, columns: int, table_side: int, interpolate: bool) -> np.ndarray:
    """Position-table indices of a rows x columns grid in reading order, int64 [rows * columns], read-only."""
    if interpolate:
        row_ids, column_ids = fractional_buckets(rows, table_side), fractional_buckets(columns, table_side)
    else:
        row_ids, column_ids = np.arange(rows), np.arange(columns)
    ids = (row_ids[:, None] * table_side + column_ids[None, :]).reshape(-1)
    ids.setflags(write=False)
    return ids
