"""The frozen autoencoder's part of the encode phase: pictures to clean latents, for the first and last stage.

Who encodes which picture is decided by the caller. A picture may come as moments that were stored before.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from megabagel.config.schema import Config
from megabagel.data.handout import is_stored
from megabagel.data.pack import Pack
from megabagel.models.autoencoder import Autoencoder
from megabagel.models.build import DTYPES
from megabagel.models.costs import autoencoder_flops
from megabagel.runtime import rng
from megabagel.runtime.distributed import Layout
from megabagel.runtime.exchange import exchange, plan_exchange

PIXELS_AT_ONCE = 2**20  # of pictures encoded as one batch: bounds the memory of activations


def normalise(image: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """uint8 [..., 3, H, W] -> [-1, 1] in `dtype`."""
    return (image.to(device).float() / 127.5 - 1).to(dtype)


@torch.no_grad()
def moments_of(
    autoencoder: Autoencoder, images: Sequence[Tensor], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Of each picture the moments, float32 [2z, h, w]: pictures of one size are encoded together, stored ones are
    moments already."""
    moments = [image.to(device, torch.float32) if is_stored(image.shape) else None for image in images]
    by_shape = defaultdict(list)
    for place, image in enumerate(images):
        if moments[place] is None:
            by_shape[image.shape].append(place)
    for shape, places in by_shape.items():
        at_once = max(1, PIXELS_AT_ONCE // (shape[1] * shape[2]))
        for start in range(0, len(places), at_once):
            batch = places[start : start + at_once]
            pixels = normalise(torch.stack([images[place] for place in batch]), device, dtype)
            for place, encoded in zip(batch, autoencoder.encode_moments(pixels).float(), strict=True):
                moments[place] = encoded
    return moments


class LatentEncoder:
    """One rank's share of the latents of a step. `autoencoder` is None for a model that makes no images."""

    def __init__(self, config: Config, layout: Layout, autoencoder: Autoencoder | None):
        self.layout, self.seed, self.autoencoder = layout, config.data.seed, autoencoder
        self.dtype = DTYPES[config.training.params_dtype]
        self.channels = config.model.latent_patch_size**2 * config.model.vae.z_channels  # values of a token

    def costs(self, packs: list[Pack]) -> list[int]:
        """Operations for each picture of the step; none for stored ones."""
        if self.autoencoder is None:
            return []
        shapes = [image.shape for pack in packs for image in pack.vae_images]
        return [0 if is_stored(s) else autoencoder_flops(self.autoencoder.config, *s[1:]) for s in shapes]

    @torch.no_grad()
    def encode(self, packs: list[Pack], owners: list[int]) -> list[Tensor]:
        """`owners`: rank of the replica that encodes each picture, the only one that needs its content. -> per pack,
        float32 [G * channels] on the first and last stage, picture after picture as in `StreamInputs`, [0] elsewhere.
        Every rank of the replica calls it."""
        images = [image for pack in packs for image in pack.vae_images]
        keys = [key for pack in packs for key in pack.plan.image_keys.tolist()]
        grids = torch.cat([pack.plan.latent_grids for pack in packs])
        tokens = grids.prod(dim=1)
        me = self.layout.replica_ranks.index(self.layout.rank)
        mine = [index for index, owner in enumerate(owners) if owner == me]
        sizes = [int(tokens[index]) for index in mine]
        # as many rows as a picture has tokens: a row is a piece of it
        rows = torch.empty(sum(sizes), self.channels, device=self.layout.device)
        moments = moments_of(self.autoencoder, [images[n] for n in mine], self.layout.device, self.dtype)
        for index, values, part in zip(mine, moments, rows.split(sizes), strict=True):
            part.copy_(self._draw(values, keys[index]).reshape_as(part))
        wanted = self._wanted(int(tokens.sum()))
        if images:
            row_owners = torch.tensor(owners).repeat_interleave(tokens)
            rows = exchange(rows, plan_exchange(row_owners, wanted, me), self.layout.replica_device_group)
        parts = rows.split([len(pack.plan.gen_index) if len(wanted[me]) else 0 for pack in packs])
        return [part.flatten() for part in parts]

    def _wanted(self, tokens: int) -> list[Tensor]:
        """Per rank of the replica, the latent tokens that it needs: all of them on the first and the last stage."""
        ranks, stage = len(self.layout.replica_ranks), len(self.layout.last_stage_ranks)
        every, none = torch.arange(tokens), torch.arange(0)
        return [every if rank < stage or rank >= ranks - stage else none for rank in range(ranks)]

    def _draw(self, moments: Tensor, key: list[int]) -> Tensor:
        """A latent [z, h, w] from the posterior of the picture with that key."""
        shape = (len(moments) // 2, *moments.shape[1:])
        noise = torch.from_numpy(rng.normal(self.seed, "posterior", key, shape)).to(moments.device)
        return self.autoencoder.sample(moments[None], noise[None])[0]
