"""The ViT's part of the encode phase: patches for a tower that trains, finished features of a frozen one.

A tower that trains runs inside the model, on the first stage. Who encodes which picture is decided by the caller.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megabagel.config.schema import Config
from megabagel.data.reader import Pack
from megabagel.models.autoencoder import patchify
from megabagel.models.build import DTYPES
from megabagel.models.costs import vision_flops
from megabagel.models.vision import VisionTower
from megabagel.models.vision_spread import chunk_tokens, image_owners
from megabagel.runtime.distributed import Layout
from megabagel.runtime.exchange import exchange, plan_exchange
from megabagel.training.encode_latents import normalise

PATCHES_AT_ONCE = 2**14  # of pictures encoded as one batch: bounds the memory of activations


class VisionEncoder:
    """One rank's share of what the ViT sees of a step. `tower`: the frozen ViT; None if it trains or there is none."""

    def __init__(self, config: Config, layout: Layout, tower: VisionTower | None):
        self.layout, self.config, self.tower = layout, config.model.vit, tower
        self.dtype = DTYPES[config.training.params_dtype]

    def costs(self, packs: list[Pack]) -> list[int]:
        """Operations for each picture that a frozen tower encodes."""
        if self.tower is None:
            return []
        return [vision_flops(self.config, tokens) for pack in packs for tokens in pack.plan.vit_seqlens.tolist()]

    def owners(self, packs: list[Pack]) -> list[int]:
        """Rank of the replica, one of the first stage, that runs a tower that trains on each picture."""
        stage, seqlens = len(self.layout.last_stage_ranks), [pack.plan.vit_seqlens.tolist() for pack in packs]
        return [owner for tokens in seqlens for owner in image_owners(tokens, self.config, stage)]

    def patches(self, pack: Pack) -> Tensor:
        """What a tower that trains needs: [m, p*p*3] of the pictures whose pixels this rank has."""
        return self._cut([image for image in pack.vit_images if not image.is_meta])

    def _cut(self, images: list[Tensor]) -> Tensor:
        """Pictures, one after the other, as patches [n, p*p*3]."""
        side, device = self.config.patch_size, self.layout.device
        # a picture is a latent of 3 channels as far as cutting it into patches goes
        parts = [patchify(normalise(image, device, self.dtype), side) for image in images]
        return torch.cat([torch.empty(0, 3 * side**2, device=device, dtype=self.dtype), *parts])

    @torch.no_grad()
    def encode(self, packs: list[Pack], owners: list[int]) -> list[Tensor | None]:
        """`owners`: rank of the replica that encodes each picture, the only one that needs its pixels. -> features per
        pack of the ViT tokens of this rank's chunk, [n, hidden], on the first stage, [0, hidden] elsewhere; None if the
        ViT trains. Every rank of the replica calls it."""
        if self.tower is None:
            return [None] * len(packs)
        images = [image for pack in packs for image in pack.vit_images]
        tokens = torch.cat([pack.plan.vit_seqlens for pack in packs])
        position_ids = torch.cat([pack.plan.vit_position_ids for pack in packs]).split(tokens.tolist())
        me = self.layout.replica_ranks.index(self.layout.rank)
        features = [torch.empty(0, self.config.hidden_size, device=self.layout.device, dtype=self.dtype)]
        for batch in _batches([index for index, owner in enumerate(owners) if owner == me], tokens.tolist()):
            ids = torch.cat([position_ids[index] for index in batch]).to(self.layout.device)
            patches = self._cut([images[index] for index in batch])
            features.append(self.tower(patches, ids, tokens[batch].tolist()))
        rows, wanted = torch.cat(features), self._wanted(packs)
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
