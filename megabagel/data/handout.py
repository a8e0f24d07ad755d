"""Hands the pictures of a step out: each one goes from the rank that read it to the one rank that works on it.

Who works on which picture is decided by the caller. Plans and shapes are on every rank before, see `broadcast.py`.
"""

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megabagel.data.pack import Pack


def is_stored(shape: Sequence[int]) -> bool:
    """Whether a picture of this shape is what an encoder made of it before, float32 or bfloat16: moments [2z, h, w] or
    features [n, hidden]. Otherwise it is pixels: uint8 [3, H, W]."""
    return len(shape) != 3 or shape[0] != 3  # 2z is even


def unseen(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A picture that is on another rank: its shape and type only."""
    return torch.empty(shape, dtype=dtype, device="meta")


def hand_out(packs: list[Pack], owners: list[int], group: dist.ProcessGroup, source: int) -> list[Pack]:
    """The packs, every picture with its content on the rank of `group` that `owners` names, and `unseen` elsewhere.

    Rank `source` of the group has all content before, the others need shapes only; `packs` are left as they are. Every
    rank of the group, which has a CPU backend, calls it. `owners`: of the VAE pictures of all packs, then of the ViT
    pictures. While it sends, the source holds one more copy of what the others get. Raises ValueError when owners and
    pictures are not equally many.
    """
    images = [i for pack in packs for i in pack.vae_images] + [i for pack in packs for i in pack.vit_images]
    held = iter(_exchange(images, owners, group, source))
    vae = [[next(held) for _ in pack.vae_images] for pack in packs]
    vit = [[next(held) for _ in pack.vit_images] for pack in packs]
    return [dataclasses.replace(pack, vae_images=a, vit_images=b) for pack, a, b in zip(packs, vae, vit, strict=True)]


def _exchange(images: list[Tensor], owners: list[int], group: dist.ProcessGroup, source: int) -> list[Tensor]:
    """In one all-to-all, in which only the source sends."""
    rank, ranks = group.rank(), range(group.size())
    held = [i if rank == owner == source else unseen(i.shape, i.dtype) for i, owner in zip(images, owners, strict=True)]
    # the wider type first: no picture then starts at an odd byte
    order = sorted(range(len(owners)), key=lambda n: -images[n].element_size())
    travels = [[n for n in order if owners[n] == r != source] for r in ranks]
    if not any(travels):
        return held
    sizes = [sum(images[n].nbytes for n in part) for part in travels]
    received, nothing = torch.empty(sizes[rank], dtype=torch.uint8), [0] * len(sizes)
    if rank == source:
        sent = torch.cat([images[n].flatten().view(torch.uint8) for part in travels for n in part])
        dist.all_to_all_single(received, sent, nothing, sizes, group=group)
    else:
        incoming = [sizes[rank] if r == source else 0 for r in ranks]
        dist.all_to_all_single(received, received.new_empty(0), incoming, nothing, group=group)
    parts = received.split([images[n].nbytes for n in travels[rank]])
    for n, content in zip(travels[rank], parts, strict=True):
        held[n] = content.view(images[n].dtype).view(images[n].shape)
    return held
