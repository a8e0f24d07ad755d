"""Pictures as the model reads and makes them: pixels to ViT patches and latent tokens, latent tokens to pixels.

Every picture is worked on at its own size, one by one.
"""

import numpy as np
import torch
from torch import Tensor

from megabagel.models.autoencoder import Autoencoder, patchify, unpatchify

Grid = tuple[int, int]


def normalise(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [-1, 1]."""
    return torch.as_tensor(pixels).permute(2, 0, 1).float() / 127.5 - 1


def to_patches(pixels: np.ndarray | Tensor, patch_size: int) -> tuple[Tensor, Grid]:
    """uint8 [H, W, 3], sides multiples of `patch_size` -> float32 [rows * columns, p*p*3] in [-1, 1], rows and
    columns."""
    height, width = pixels.shape[:2]
    # a picture is a latent of 3 channels as far as cutting it into patches goes
    return patchify(normalise(pixels), patch_size), (height // patch_size, width // patch_size)


@torch.no_grad()
def to_latents(
    autoencoder: Autoencoder, pixels: np.ndarray | Tensor, noise: Tensor, latent_patch: int
) -> tuple[Tensor, Grid]:
    """uint8 [H, W, 3] and N(0, 1) noise [z, h, w] of the posterior -> float32 tokens [rows * columns, d], rows and
    columns."""
    weight = next(autoencoder.parameters())
    moments = autoencoder.encode_moments(normalise(pixels)[None].to(weight.device, weight.dtype)).float()
    latent = autoencoder.sample(moments, noise[None].to(weight.device))[0]
    return patchify(latent, latent_patch), (latent.shape[1] // latent_patch, latent.shape[2] // latent_patch)


@torch.no_grad()
def from_latents(autoencoder: Autoencoder, tokens: Tensor, grid: Grid, latent_patch: int) -> Tensor:
    """Latent tokens [rows * columns, d] -> the decoder's picture, float32 [3, H, W], nominally in [-1, 1]."""
    weight = next(autoencoder.parameters())
    latent = unpatchify(tokens, grid[0] * latent_patch, grid[1] * latent_patch, latent_patch)
    return autoencoder.decode(latent[None].to(weight.device, weight.dtype))[0].float()


def to_pixels(decoded: Tensor) -> np.ndarray:
    """float [3, H, W], nominally in [-1, 1] -> uint8 [H, W, 3]; fractions are cut off, as in BAGEL."""
    return ((decoded * 0.5 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).to("cpu", torch.uint8).numpy()
