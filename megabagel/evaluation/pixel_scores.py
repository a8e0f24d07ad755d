"""Pictures against the pictures that they should be: PSNR, SSIM and LPIPS."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megabagel.config.errors import ConfigError
from megabagel.data.images import resize
from megabagel.evaluation.extra import library

IDENTICAL = 100.0  # dB that stand for no difference at all


def as_pixels(image: Image.Image) -> Tensor:
    """float32 [1, 3, H, W], 0 .. 255."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()


def alike(image: Image.Image, target: Image.Image) -> tuple[Tensor, Tensor]:
    """Both as pixels, the target in the size of the picture."""
    resized = Image.fromarray(resize(target.convert("RGB"), image.size))
    return as_pixels(image), as_pixels(resized)


def psnr(image: Image.Image, target: Image.Image) -> float:
    """dB, of values 0 .. 255; at most IDENTICAL."""
    score = library("torchmetrics.functional.image").peak_signal_noise_ratio
    return min(IDENTICAL, float(score(*alike(image, target), data_range=255.0)))


def ssim(image: Image.Image, target: Image.Image) -> float:
    """Structural similarity with torchmetrics' defaults (Gaussian window of 11 pixels), at most 1."""
    score = library("torchmetrics.functional.image").structural_similarity_index_measure
    # variances are small differences of large numbers
    ours, theirs = (pixels.double() for pixels in alike(image, target))
    return float(score(ours, theirs, data_range=255.0))


class Lpips:
    """LPIPS (Zhang et al. 2018) with VGG16, as TorchScript: called with pictures 0 .. 255 and `return_lpips` it gives
    vectors whose squared distance is the score."""

    def __init__(self, path: str, device) -> None:
        self._network, self._device = load_script(path, "vgg", device), device

    @torch.no_grad()
    def __call__(self, image: Image.Image, target: Image.Image) -> float:
        """0 for equal pictures."""
        ours, theirs = (
            self._network(pixels.to(self._device), resize_images=False, return_lpips=True)
            for pixels in alike(image, target)
        )
        return float((ours - theirs).square().sum())


def load_script(path: str, setting: str, device) -> torch.jit.ScriptModule:
    """A TorchScript file. Raises ConfigError."""
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"models.{setting}: {path} is no TorchScript file ({reason}); see --{setting}.") from None
