"""The PackPlan: everything about one packed sequence except its content, as small integer tensors.

It is the only thing that data and models share. Built by `planner.py`; this file only says what it holds.

Vocabulary: the *sequence* is the packed order of the samples, length L, as in BAGEL. The *und stream* (text and ViT
tokens) and the *gen stream* (VAE latent tokens) hold the same tokens split by modality, each in sequence order, each
padded at its end to `und_length` / `gen_length` with at least one padding row. A *stream row* counts inside one stream.
A *split* (a text, an image) sees what is not noised before it in its sample, then itself. The *attention order* puts
all positions that later splits may see first and the noised ones behind them: there, what a split sees before itself is
one run of rows, and so are its own.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class PackPlan:
    """All tensors int64 on the same device unless stated; row counts: L sequence, U und, G gen, Nt text, Nv ViT tokens,
    Nc cross-entropy rows, Nm MSE rows, S splits, P attention problems, I VAE images. Memory grows linearly with L."""

    und_length: int  # padded length of the und stream, > U
    gen_length: int  # padded length of the gen stream, > G

    und_index: Tensor  # [U] sequence position of each und row
    gen_index: Tensor  # [G] sequence position of each gen row
    position_ids: Tensor  # [L] RoPE position of each sequence position

    text_ids: Tensor  # [Nt] token ids, special tokens included
    text_rows: Tensor  # [Nt] row in the und stream
    vit_rows: Tensor  # [Nv] row in the und stream
    vit_position_ids: Tensor  # [Nv] index into the ViT position tables
    vit_seqlens: Tensor  # [number of ViT images] tokens per image
    latent_position_ids: Tensor  # [G] index into the latent position table
    latent_grids: Tensor  # [I, 2] rows and columns of each VAE image, in latent patches
    timesteps: Tensor  # [G] float32 before sigmoid and shift; -inf for clean images
    image_keys: Tensor  # [I, key length] counter-based seed of posterior and flow noise of each VAE image

    ce_rows: Tensor  # [Nc] row in the und stream
    ce_labels: Tensor  # [Nc]
    ce_weights: Tensor  # [Nc] float32: 1/sqrt(text length + 1) for text, 1 for special tokens
    mse_rows: Tensor  # [Nm] row in the gen stream

    sample_lens: Tensor  # [number of samples] tokens, sum = L
    split_lens: Tensor  # [S] tokens, sum = L
    split_modes: Tensor  # [S] 0 causal, 1 full, 2 noise
    attention_index: Tensor  # [L] sequence position of each row in attention order
    problems: Tensor  # [P, 5] rows in attention order, see `Problem`; neighbouring texts of a sample are one problem

    @property
    def sequence_length(self) -> int:
        return self.position_ids.numel()

    def to(self, device: torch.device | str) -> "PackPlan":
        """Copy on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return PackPlan(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()})


CAUSAL, FULL, NOISE = 0, 1, 2


class Problem(NamedTuple):
    """A row of `PackPlan.problems`: queries are rows start .. start + length, keys are rows prefix_start ..
    prefix_start + prefix_length, then the queries' own rows. A causal problem is aligned at the lower right."""

    start: int
    length: int
    prefix_start: int
    prefix_length: int
    causal: int  # 0 or 1
