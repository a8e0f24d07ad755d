"""Which of some candidates a made picture is nearest to, in the space of the autoencoder's latents.

Pure functions of latents; who the candidates are is said where they are chosen.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megabagel.models.autoencoder import Autoencoder
from megabagel.training.encode_latents import moments_of


@torch.no_grad()
def latents_of(autoencoder: Autoencoder, images: Sequence[Image.Image]) -> Tensor:
    """float32 [pictures, values]: means of the posterior, nothing is drawn; the pictures are of one size."""
    weight = next(autoencoder.parameters())
    pixels = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]
    moments = torch.stack(moments_of(autoencoder, pixels, weight.device, weight.dtype))
    return moments[:, : moments.shape[1] // 2].flatten(1).cpu()


def nearest(made: Tensor, candidates: Tensor) -> int:
    """Index of the row of `candidates` [n, values] with the least Euclidean distance to `made` [values]."""
    return int((candidates - made).square().sum(dim=1).argmin())


def hits(made: Tensor, candidates: Sequence[Tensor], right: Sequence[int]) -> list[bool]:
    """Of each row of `made` whether its nearest candidate, of its own [n, values], is the right one."""
    return [nearest(one, those) == index for one, those, index in zip(made, candidates, right, strict=True)]
