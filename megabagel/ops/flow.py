"""Latent pictures become tokens of rectified flow (Liu et al. 2022): patch order, the point on the path, the target.

Data in, data out: no gradient passes. Which time a picture gets is decided elsewhere.
"""

import torch
from torch import Tensor

from megabagel.ops import library


def flow_mix_reference(
    latents: Tensor, grids: Tensor, noise: Tensor, times: Tensor, patch_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same with PyTorch's functions."""
    p, width = patch_size, noise.shape[1]
    tokens = []
    for (rows, columns), picture in zip(grids.tolist(), latents.split((grids.prod(1) * width).tolist()), strict=True):
        parts = picture.view(-1, rows, p, columns, p) if len(picture) else picture.view(width, 0, 1, 1, 1)
        tokens.append(parts.permute(1, 3, 2, 4, 0).reshape(-1, width))
    clean = torch.cat([noise[:0], *tokens])
    t = times[:, None]
    return ((1 - t) * clean + t * noise).to(dtype), noise - clean


def flow_mix(
    latents: Tensor, grids: Tensor, noise: Tensor, times: Tensor, patch_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """-> x_t = (1 - t) * x0 + t * noise, [G, d] in `dtype` (float32 or bfloat16), and noise - x0, float32 [G, d].

    latents: float32 [G * d], the pictures x0 one after the other, each [channels, rows * patch, columns * patch].
    grids: int64 [pictures, 2], their rows and columns in patches, whose products sum to G. noise: float32 [G, d],
    times: float32 [G]. Tokens of a picture are row-major, the d values of a token ordered row, column, channel.

    Raises ValueError for an input that requires a gradient, and RuntimeError on the CPU for sizes that do not fit; on
    CUDA a token without a picture becomes zeros.
    """
    if latents.requires_grad or noise.requires_grad or times.requires_grad:
        raise ValueError("flow_mix: latents, noise and times are data, but one of them requires a gradient.")
    if not library.has_kernel("flow_mix", latents):
        return flow_mix_reference(latents, grids, noise, times, patch_size, dtype)
    return torch.ops.megabagel.flow_mix(latents, grids, noise, times, patch_size, dtype)


if library.LOADED:
    torch.library.register_fake(
        "megabagel::flow_mix",
        lambda latents, grids, noise, times, patch_size, dtype: (
            noise.new_empty(noise.shape, dtype=dtype),
            noise.new_empty(noise.shape),
        ),
    )
