"""How large pictures are: those that a model is shown, by its ViT and by its autoencoder, and those that it makes."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from megabagel.config.datasets import ImageTransformArgs
from megabagel.config.errors import ConfigError
from megabagel.data.images import resize, target_size
from megabagel.packing.geometry import Geometry


@dataclass(frozen=True)
class PictureSizes:
    """Limits in pixels; the defaults are BAGEL's at inference, where the position tables are as large."""

    latent: ImageTransformArgs  # pictures through the autoencoder
    vit: ImageTransformArgs

    @classmethod
    def of(cls, geometry: Geometry) -> "PictureSizes":
        """The limits for a model: never more than its position tables hold."""
        latent_side = geometry.latent_stride * geometry.max_latent_size
        vit_side = geometry.vit_patch_size * geometry.vit_max_num_patch_per_side
        return cls(
            _limits(geometry.latent_stride, min(1024, latent_side), 512),
            _limits(geometry.vit_patch_size, min(980, vit_side), 224),
        )

    def for_latents(self, image: Image.Image) -> np.ndarray:
        """uint8 [H, W, 3] for the autoencoder."""
        return resize(image, target_size(*image.size, self.latent))

    def for_vit(self, image: Image.Image) -> np.ndarray:
        """uint8 [H, W, 3] for the ViT."""
        return resize(image, target_size(*image.size, self.vit))

    def grid(self, height: int | None, width: int | None, shown: Image.Image | None) -> tuple[int, int]:
        """Rows and columns, in latent tokens, of a picture to be made; a side that is not given is that of the picture
        shown last, else the largest. Raises ConfigError for a size that the model cannot make."""
        stride, largest = self.latent.image_stride, self.latent.max_image_size // self.latent.image_stride
        default = (largest * stride,) * 2
        if shown is not None:
            default = target_size(*shown.size, self.latent)[::-1]
        height, width = height or default[0], width or default[1]
        if any(side < 1 or side % stride or side > largest * stride for side in (height, width)):
            raise ConfigError(
                f"a picture of {height} x {width} pixels (height x width) cannot be made: both sides must be multiples "
                f"of {stride} from {stride} to {largest * stride}."
            )
        return height // stride, width // stride


def _limits(stride: int, largest: int, least: int) -> ImageTransformArgs:
    largest = largest // stride * stride
    return ImageTransformArgs(image_stride=stride, max_image_size=largest, min_image_size=min(least, largest))
