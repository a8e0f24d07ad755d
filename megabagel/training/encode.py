"""The encode phase: pictures of a step become latents, noise and ViT patches before the pipeline runs.

The frozen autoencoder's work is spread over all ranks of the model replica; every draw is keyed by the image, so that
who encodes it, the packing and the layout change the result by rounding only.
"""

from collections import defaultdict

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megabagel.config.schema import Config
from megabagel.data.reader import Pack
from megabagel.models.autoencoder import Autoencoder, patchify
from megabagel.models.build import DTYPES
from megabagel.models.embeddings import StreamInputs
from megabagel.packing.plan import PackPlan
from megabagel.runtime import rng
from megabagel.runtime.distributed import Layout

PIXELS_AT_ONCE = 2**20  # of pictures encoded as one batch: bounds the memory of the autoencoder's activations


def normalise(image: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """uint8 [..., 3, H, W] -> [-1, 1] in `dtype`."""
    return (image.to(device).float() / 127.5 - 1).to(dtype)


def spread(costs: list[int], workers: int) -> list[int]:
    """Owner of each piece of work: largest first, each to the least loaded worker."""
    load, owners = [0] * workers, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[piece] = min(range(workers), key=load.__getitem__)
        load[owners[piece]] += costs[piece]
    return owners


def flow_noise(plan: PackPlan, seed: int, channels: int) -> Tensor:
    """Flow noise of every latent token of a plan: float32 [G, channels]."""
    grids, keys = plan.latent_grids.tolist(), plan.image_keys.tolist()
    parts = [
        torch.from_numpy(rng.normal(seed, "flow", key, (rows * columns, channels)))
        for (rows, columns), key in zip(grids, keys, strict=True)
    ]
    return torch.cat(parts) if parts else torch.empty(0, channels)


class Encoder:
    """Encodes the packs of one step. `autoencoder` is None for a model that makes no images."""

    def __init__(self, config: Config, layout: Layout, autoencoder: Autoencoder | None):
        self.layout, self.seed = layout, config.data.seed
        self.dtype = DTYPES[config.training.params_dtype]
        self.patch_size, self.latent_patch_size = config.model.vit.patch_size, config.model.latent_patch_size
        self.channels = self.latent_patch_size**2 * config.model.vae.z_channels
        self.see_images = config.model.visual_und and layout.is_first_stage
        self.autoencoder = autoencoder

    def __call__(self, packs: list[Pack]) -> list[StreamInputs | None]:
        """One entry per pack; None on the stages between the first and the last."""
        latents = self._latents(packs)
        if not (self.layout.is_first_stage or self.layout.is_last_stage):
            return [None] * len(packs)
        device = self.layout.device
        return [
            StreamInputs(self._vit_patches(pack), clean, flow_noise(pack.plan, self.seed, self.channels).to(device))
            for pack, clean in zip(packs, latents, strict=True)
        ]

    def _vit_patches(self, pack: Pack) -> Tensor:
        """[Nv, p*p*3] on the first stage, empty elsewhere."""
        images = pack.vit_images if self.see_images else []
        # a picture is a latent of 3 channels as far as cutting it into patches goes
        parts = [patchify(normalise(image, self.layout.device, self.dtype), self.patch_size) for image in images]
        empty = torch.empty(0, 3 * self.patch_size**2, device=self.layout.device, dtype=self.dtype)
        return torch.cat([empty, *parts])

    @torch.no_grad()
    def _latents(self, packs: list[Pack]) -> list[Tensor]:
        """float32 [G, channels] per pack, the same on all ranks of the replica."""
        images = [image for pack in packs for image in pack.vae_images]
        keys = [key for pack in packs for key in pack.plan.image_keys.tolist()]
        grids = [grid for pack in packs for grid in pack.plan.latent_grids.tolist()]
        tokens = [rows * columns for rows, columns in grids]
        latents = torch.zeros(sum(tokens), self.channels, device=self.layout.device)
        owners = spread(tokens, len(self.layout.replica_ranks))
        mine = self.layout.replica_ranks.index(self.layout.rank)
        by_shape = defaultdict(list)
        for owner, *work in zip(owners, images, keys, latents.split(tokens), strict=True):
            if owner == mine:
                by_shape[work[0].shape].append(work)
        for shape, works in by_shape.items():
            size = max(1, PIXELS_AT_ONCE // (shape[1] * shape[2]))
            for start in range(0, len(works), size):
                self._encode(works[start : start + size])
        if images and len(self.layout.replica_ranks) > 1:
            dist.all_reduce(latents, group=parallel_state.get_model_parallel_group())  # every row has one owner
        return list(latents.split([len(pack.plan.gen_index) for pack in packs]))

    def _encode(self, works: list[tuple[Tensor, list[int], Tensor]]) -> None:
        """(picture, key, rows to fill) of pictures of one size, as one batch."""
        images, keys, rows = zip(*works, strict=True)
        pixels = normalise(torch.stack(images), self.layout.device, self.dtype)
        moments = self.autoencoder.encode_moments(pixels).float()
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        noise = torch.stack([torch.from_numpy(rng.normal(self.seed, "posterior", key, shape)) for key in keys])
        for row, latent in zip(rows, self.autoencoder.sample(moments, noise.to(moments.device)), strict=True):
            row.copy_(patchify(latent, self.latent_patch_size))
