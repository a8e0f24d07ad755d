"""Whether stored latents and features come from the very weights that a run has; what is in them is read elsewhere."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from megabagel.config.datasets import GroupConfig
from megabagel.data.faults import DataError
from megabagel.data.stored import stored_kinds
from megabagel.models.autoencoder import Autoencoder
from megabagel.models.vision import VisionTower


def fingerprint(network: Autoencoder | VisionTower) -> str:
    """Of the weights that encode pictures, rounded to bf16: the same whichever precision they were loaded in."""
    encoder: nn.Module = network.encoder if isinstance(network, Autoencoder) else network
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(encoder.named_parameters()):
        values = weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def check_stored(
    groups: Mapping[str, GroupConfig], autoencoder: Autoencoder | None, vision: VisionTower | None
) -> None:
    """Compare what is stored for `groups` with the encoders of this run; None for those that train or are absent, of
    which nothing that was stored is used.

    Raises DataError when other weights made it.
    """
    networks = {"vae_image": ("autoencoder", autoencoder), "vit_image": ("ViT", vision)}
    known: dict[str, str] = {}
    for name, group in groups.items():
        for kind, folder, header in stored_kinds(group.latents_dir) if group.latents_dir else []:
            title, network = networks[kind]
            if network is None:
                continue
            if kind not in known:
                known[kind] = fingerprint(network)
            if header.encoder != known[kind]:
                raise DataError(
                    f"group {name}: {folder} was stored with another {title} than this run has; encode the group "
                    "anew with tools/encode_latents.py into an empty folder, or remove latents_dir."
                )
