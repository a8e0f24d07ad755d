"""Sets of pictures against sets of pictures: FID (Heusel et al. 2017) and KID (Binkowski et al. 2018).

Features come from a given network; the arithmetic is torchmetrics'.
"""

import base64
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from megabagel.evaluation.extra import library
from megabagel.evaluation.pixel_scores import as_pixels, load_script

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


class Inception:
    """Inception-v3 of the original FID, as TorchScript: called with uint8 pictures and `return_features` it resizes
    them itself and gives 2048 numbers each."""

    def __init__(self, path: str, device) -> None:
        self._network, self._device = load_script(path, "inception", device), device

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> str:
        """Features, packed as text."""
        features = self._network(as_pixels(image).to(self._device, torch.uint8), return_features=True)
        return pack(features[0].float().cpu().numpy())


def pack(vector: np.ndarray) -> str:
    """float32 numbers as text that loses nothing."""
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()


def unpack(texts: Sequence[str]) -> Tensor:
    """float64 [n, d]."""
    return torch.from_numpy(np.stack([np.frombuffer(base64.b64decode(text), dtype="<f4") for text in texts])).double()


class _Features(nn.Module):
    """For metrics that want a network: what they are given are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(made: Tensor, real: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features [n, d] and [m, d], both at least 2 rows; 0 is best."""
    return float(_filled("torchmetrics.image.fid", "FrechetInceptionDistance", made, real).compute())


def kid(made: Tensor, real: Tensor) -> tuple[float, float]:
    """Mean and deviation of the squared maximum mean discrepancy, cubic kernel, over subsets of KID_SUBSET_SIZE, or of
    as many rows as both have; 0 is best."""
    size = min(KID_SUBSET_SIZE, len(made), len(real))
    metric = _filled("torchmetrics.image.kid", "KernelInceptionDistance", made, real, size=size)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # the subsets are always the same
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def _filled(module: str, name: str, made: Tensor, real: Tensor, size: int | None = None):
    settings = {} if size is None else {"subsets": KID_SUBSETS, "subset_size": size}
    metric = getattr(library(module), name)(feature=_Features(made.shape[1]), **settings)
    if size is None:
        metric.set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(made, real=False)
    return metric
