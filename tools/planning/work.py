"""What a pack is made of and how many floating-point operations each part of the model spends on it."""

from dataclasses import dataclass, replace

from layouts.memory_formula import Sizes
from layouts.traffic_formula import Load

from megabagel.config.pipeline_split import TokenMix
from megabagel.config.precision import rows_per_tile
from megabagel.config.schema import Config
from megabagel.packing.cost import CostModel
from megabagel.training.cost_model import cost_model


@dataclass(frozen=True)
class PackWork:
    """FLOPs of one pack over all ranks of a replica, forward and backward, without recomputation and padding."""

    linears: float  # of all decoder layers
    attention: float
    heads: float
    inputs: float  # connector and latent projection
    vision: float
    autoencoder: float  # forward only, before the pipeline

    @property
    def model(self) -> float:
        """What MFU counts: all but the frozen autoencoder."""
        return self.linears + self.attention + self.heads + self.inputs + self.vision


def tokens_of(config: Config, mix: TokenMix, tokens: int) -> dict[str, float]:
    """Tokens of a pack of `tokens` by kind; a modality that the model lacks is text."""
    model = config.model
    vae = tokens * mix.vae / 100 if model.visual_gen else 0
    vit = tokens * mix.vit / 100 if model.visual_und else 0
    mse = tokens * mix.mse / 100 if model.visual_gen else 0
    return {"und": tokens - vae, "gen": vae, "vit": vit, "ce": tokens * mix.ce / 100, "mse": mse}


def pack_work(config: Config, mix: TokenMix, tokens: int, stored: bool = False) -> PackWork:
    """Of a pack of `tokens`. `stored`: latents come encoded from disk."""
    each: CostModel = cost_model(config.model)
    kind = tokens_of(config, mix, tokens)
    keys = min(mix.keys, tokens)
    patches = min(mix.patches, config.model.vit.max_num_patch_per_side**2)
    pixels = 0 if stored else kind["gen"] * each.latent_pixels_per_token
    a_picture = min(mix.patches, config.model.max_latent_size**2) * each.latent_pixels_per_token
    return PackWork(
        linears=each.und_token * kind["und"] + each.gen_token * kind["gen"],
        attention=keys * (each.und_pair * kind["und"] + each.gen_pair * kind["gen"]),
        heads=each.ce_row * kind["ce"] + each.mse_row * kind["mse"],
        inputs=each.connector_token * kind["vit"] + each.latent_token * kind["gen"],
        vision=kind["vit"] * (each.vit_token + patches * each.vit_pair),
        autoencoder=pixels * (each.latent_pixel + a_picture * each.latent_pixel_pair),
    )


def load_of(config: Config, mix: TokenMix, sizes: Sizes, packs: int) -> Load:
    """Full packs, padded to tiles: what memory has to hold and what is sent at most."""
    tile = rows_per_tile(config.kernels) * sizes.tp * sizes.cp
    kind = tokens_of(config, mix, config.data.max_num_tokens)
    und, gen = (max(tile, -(-int(kind[name]) // tile) * tile) for name in ("und", "gen"))
    return Load(und, gen, packs, int(kind["vit"]), int(kind["ce"]), int(kind["mse"]))


def typical(config: Config, load: Load, sizes: Sizes) -> Load:
    """The same with packs of expected size; a pipeline pads every pack to the largest one."""
    if sizes.pp > 1:
        return load
    share = min(1.0, config.data.expected_num_tokens / config.data.max_num_tokens)
    return replace(load, und_rows=load.und_rows * share, gen_rows=load.gen_rows * share)
