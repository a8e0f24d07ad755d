"""The encode phase: pictures of a step become latents, noise and ViT inputs before the pipeline runs.

What does not train, the autoencoder and a frozen ViT, works spread over all ranks of the model replica; pixels go to
the one rank that needs them. Every draw is keyed by the image, so who encodes it, the packing and the layout change the
result by rounding only.
"""

import torch
from torch import Tensor

from megabagel.config.schema import Config
from megabagel.data.handout import hand_out
from megabagel.data.pack import Pack
from megabagel.models.autoencoder import Autoencoder
from megabagel.models.embeddings import StreamInputs
from megabagel.models.vision import VisionTower
from megabagel.packing.plan import PackPlan
from megabagel.runtime import rng
from megabagel.runtime.balance import imbalance, spread
from megabagel.runtime.distributed import Layout
from megabagel.training.encode_latents import LatentEncoder
from megabagel.training.encode_vision import VisionEncoder


def flow_noise(plan: PackPlan, seed: int, channels: int) -> Tensor:
    """Flow noise of every latent token of a plan: float32 [G, channels]."""
    grids, keys = plan.latent_grids.tolist(), plan.image_keys.tolist()
    parts = [
        torch.from_numpy(rng.normal(seed, "flow", key, (rows * columns, channels)))
        for (rows, columns), key in zip(grids, keys, strict=True)
    ]
    return torch.cat(parts) if parts else torch.empty(0, channels)


class Encoder:
    """Encodes the packs of one step. `autoencoder` is None for a model that makes no images, `vision` is given only if
    the ViT is frozen: a ViT that trains runs inside the model."""

    def __init__(
        self, config: Config, layout: Layout, autoencoder: Autoencoder | None, vision: VisionTower | None = None
    ):
        self.layout, self.seed = layout, config.data.seed
        self.latents = LatentEncoder(config, layout, autoencoder)
        self.vision = VisionEncoder(config, layout, vision)
        self.balance: float | None = None  # of the last step: largest cost of a rank over the mean; None: no picture

    def __call__(self, packs: list[Pack]) -> list[StreamInputs | None]:
        """One entry per pack; None on the stages between the first and the last. Every rank of the replica calls it;
        only the source needs what the pictures hold."""
        ranks, source = len(self.layout.replica_ranks), self.layout.replica_ranks.index(self.layout.source_rank)
        vae_costs, vit_costs = self.latents.costs(packs), self.vision.costs(packs)
        costs = vae_costs + vit_costs
        owners = spread(costs, ranks)
        self.balance = imbalance(costs, owners, ranks)
        # what was stored stays where it was read
        owners = [owner if cost else source for cost, owner in zip(costs, owners, strict=True)]
        vae_owners, vit_owners = owners[: len(vae_costs)], owners[len(vae_costs) :]
        if self.vision.tower is None:
            vit_owners = self.vision.owners(packs)
        packs = hand_out(packs, vae_owners + vit_owners, self.layout.replica_group, source)
        latents = self.latents.encode(packs, vae_owners)
        features = self.vision.encode(packs, vit_owners)
        if not (self.layout.is_first_stage or self.layout.is_last_stage):
            return [None] * len(packs)
        return [
            StreamInputs(
                self.vision.patches(pack) if feature is None else None,
                clean,
                flow_noise(pack.plan, self.seed, self.latents.channels).to(clean.device),
                feature,
            )
            for pack, clean, feature in zip(packs, latents, features, strict=True)
        ]
