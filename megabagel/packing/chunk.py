"""The part of a PackPlan that one context-parallel rank holds: one contiguous chunk of rows of each stream.

Tokens, loss rows and padding of the chunk, counted from its first row. It moves no data and knows no process groups.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megabagel.packing.plan import PackPlan


@dataclass(frozen=True)
class Chunk:
    """int64 unless stated; rows count inside the chunk. Of the chunk: Nt text, Nv ViT tokens, Nc, Nm loss rows."""

    und_length: int  # rows of the und stream, padding included
    gen_length: int
    text_ids: Tensor  # [Nt]
    text_rows: Tensor  # [Nt] und rows
    vit_tokens: Tensor  # [Nv] which of the pack's ViT tokens
    vit_rows: Tensor  # [Nv] und rows
    latents: slice  # which of the pack's latent tokens; they fill the first gen rows of the chunk
    ce_rows: Tensor  # [Nc] und rows
    ce_labels: Tensor  # [Nc]
    ce_weights: Tensor  # [Nc] float32
    mse_rows: Tensor  # [Nm] gen rows
    und_padding: Tensor  # [und_length] bool, True on padding rows
    gen_padding: Tensor  # [gen_length] bool

    def to(self, device: torch.device | str) -> "Chunk":
        """Copy on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Chunk(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()})


def chunk_of(plan: PackPlan, rank: int, size: int) -> Chunk:
    """Chunk `rank` of `size` equal ones. Raises ValueError when a stream does not divide into them."""
    for name, length in (("und", plan.und_length), ("gen", plan.gen_length)):
        if length % size:
            raise ValueError(f"the {name} stream has {length} rows, which do not divide into {size} chunks")
    und_length, gen_length = plan.und_length // size, plan.gen_length // size
    und_start, gen_start = rank * und_length, rank * gen_length
    text = _inside(plan.text_rows, und_start, und_length)
    vit = _inside(plan.vit_rows, und_start, und_length)
    ce = _inside(plan.ce_rows, und_start, und_length)
    mse = _inside(plan.mse_rows, gen_start, gen_length)
    und_count, gen_count = plan.und_index.numel(), plan.gen_index.numel()
    return Chunk(
        und_length=und_length,
        gen_length=gen_length,
        text_ids=plan.text_ids[text],
        text_rows=plan.text_rows[text] - und_start,
        vit_tokens=vit,
        vit_rows=plan.vit_rows[vit] - und_start,
        latents=slice(min(gen_start, gen_count), min(gen_start + gen_length, gen_count)),
        ce_rows=plan.ce_rows[ce] - und_start,
        ce_labels=plan.ce_labels[ce],
        ce_weights=plan.ce_weights[ce],
        mse_rows=plan.mse_rows[mse] - gen_start,
        und_padding=torch.arange(und_start, und_start + und_length) >= und_count,
        gen_padding=torch.arange(gen_start, gen_start + gen_length) >= gen_count,
    )


def _inside(rows: Tensor, start: int, length: int) -> Tensor:
    """Which entries of `rows` lie in the chunk."""
    return ((rows >= start) & (rows < start + length)).nonzero()[:, 0]
