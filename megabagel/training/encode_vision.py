"""The ViT's part of the encode phase: patches for a tower that trains, finished features of a frozen one.

A tower that trains runs inside the model, on the first stage. Who encodes which picture is decided by the caller. For
a frozen one a picture may come as features that were stored before.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megabagel.config.schema import Config
from megabagel.data.handout import is_stored
from megabagel.data.pack import Pack
from megabagel.models.autoencoder import patchify
from megabagel.models.build import DTYPES
from megabagel.models.costs import vision_flops
from megabagel.models.vision import VisionTower
from megabagel.models.vision_spread import chunk_tokens, image_owners
from megabagel.runtime.distributed import Layout
from megabagel.runtime.exchange import exchange, plan_exchange
from megabagel.training.encode_latents import normalise

PATCHES_AT_ONCE = 2**14  # of pictures encoded as one batch: bounds the memory of activations


def cut(images: Sequence[Tensor], side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pictures, one after the other, as patches [n, side*side*3]."""
    # a picture is a latent of 3 channels as far as cutting it into patches goes
    parts = [patchify(normalise(image, device, dtype), side) for image in images]
    return torch.cat([torch.empty(0, 3 * side**2, device=device, dtype=dtype), *parts])


@torch.no_grad()
def features_of(
    tower: VisionTower, images: Sequence[Tensor], position_ids: Sequence[Tensor], device: torch.device
) -> list[Tensor]:
    """Of each picture the features [n, hidden] in the tower's type; stored ones are features already. `position_ids`:
    [n] of each picture."""
    dtype = tower.patch_embedding.weight.dtype
    features = [image.to(device, dtype) if is_stored(image.shape) else None for image in images]
    tokens = [len(ids) for ids in position_ids]
    for batch in _batches([place for place, done in enumerate(features) if done is None], tokens):
        ids = torch.cat([position_ids[place] for place in batch]).to(device)
        patches = cut([images[place] for place in batch], tower.config.patch_size, device, dtype)
        sizes = [tokens[place] for place in batch]
        for place, encoded in zip(batch, tower(patches, ids, sizes).split(sizes), strict=True):
            features[place] = encoded
    return features


class VisionEncoder:
    """One rank's share of what the ViT sees of a step. `tower`: the frozen ViT; None if it trains or there is none."""

    def __init__(self, config: Config, layout: Layout, tower: VisionTower | None):
        self.layout, self.config, self.tower = layout, config.model.vit, tower
        self.dtype = DTYPES[config.training.params_dtype]

    def costs(self, packs: list[Pack]) -> list[int]:
        """Operations for each picture that a frozen tower encodes; none for stored ones."""
        if self.tower is None:
            return []
        tokens = [n for pack in packs for n in pack.plan.vit_seqlens.tolist()]
        images = [image for pack in packs for image in pack.vit_images]
        return [0 if is_stored(i.shape) else vision_flops(self.config, n) for i, n in zip(images, tokens, strict=True)]

    def owners(self, packs: list[Pack]) -> list[int]:
        """Rank of the replica, one of the first stage, that runs a tower that trains on each picture."""
        stage, seqlens = len(self.layout.last_stage_ranks), [pack.plan.vit_seqlens.tolist() for pack in packs]
        return [owner for tokens in seqlens for owner in image_owners(tokens, self.config, stage)]

    def patches(self, pack: Pack) -> Tensor:
        """What a tower that trains needs: [m, p*p*3] of the pictures whose pixels this rank has."""
        images = [image for image in pack.vit_images if not image.is_meta]
        return cut(images, self.config.patch_size, self.layout.device, self.dtype)

    @torch.no_grad()
    def encode(self, packs: list[Pack], owners: list[int]) -> list[Tensor | None]:
        """`owners`: rank of the replica that encodes each picture, the only one that needs its content. -> features per
        pack of the ViT tokens of this rank's chunk, [n, hidden], on the first stage, [0, hidden] elsewhere; None if the
        ViT trains. Every rank of the replica calls it."""
        if self.tower is None:
            return [None] * len(packs)
        images = [image for pack in packs for image in pack.vit_images]
        tokens = torch.cat([pack.plan.vit_seqlens for pack in packs])
        position_ids = torch.cat([pack.plan.vit_position_ids for pack in packs]).split(tokens.tolist())
        me = self.layout.replica_ranks.index(self.layout.rank)
        mine = [index for index, owner in enumerate(owners) if owner == me]
        features = features_of(
            self.tower, [images[n] for n in mine], [position_ids[n] for n in mine], self.layout.device
        )
        none = torch.empty(0, self.config.hidden_size, device=self.layout.device, dtype=self.dtype)
        rows, wanted = torch.cat([none, *features]), self._wanted(packs)
        if images:
            row_owners = torch.tensor(owners).repeat_interleave(tokens)
            plan = plan_exchange(row_owners, [torch.cat(parts) for parts in wanted], me)
            rows = exchange(rows, plan, self.layout.replica_device_group)
        return list(rows.split([len(part) for part in wanted[me]]))

    def _wanted(self, packs: list[Pack]) -> list[list[Tensor]]:
        """Per rank of the replica and pack, the ViT tokens of the step that it needs: of its chunk, on stage 0."""
        stage = len(self.layout.last_stage_ranks)
        chunks, start = [[] for _ in range(stage // self.layout.tp_size)], 0
        for pack in packs:
            for chunk, tokens in zip(chunks, chunk_tokens(pack.plan, len(chunks)), strict=True):
                chunk.append(start + tokens)
            start += len(pack.plan.vit_rows)
        nothing = [torch.arange(0)] * len(packs)
        first_stage = [chunk for chunk in chunks for _ in range(self.layout.tp_size)]
        return first_stage + [nothing] * (len(self.layout.replica_ranks) - stage)


def _batches(images: list[int], tokens: list[int]) -> Iterator[list[int]]:
    """The images in order, cut into batches of at most PATCHES_AT_ONCE patches, or of one image."""
    batch: list[int] = []
    for index in images:
        if batch and sum(tokens[i] for i in batch) + tokens[index] > PATCHES_AT_ONCE:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
