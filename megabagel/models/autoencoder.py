"""FLUX-style image autoencoder in plain PyTorch, with the module names of the released `ae.safetensors`.

Pictures to latents and back, latents to tokens and back. It is not parallel and, inside megabagel, never trained.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megabagel.config.autoencoder import AutoencoderConfig
from megabagel.config.folder import read_autoencoder_config

WEIGHTS_NAME = "ae.safetensors"
NORM_EPS = 1e-6


class AutoencoderError(ValueError):
    """Autoencoder weights or parameters that cannot be used; the message is one sentence for the user."""


def _norm(config: AutoencoderConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.num_groups, channels, eps=NORM_EPS, affine=True)


class ResnetBlock(nn.Module):
    """[b, c_in, h, w] -> [b, c_out, h, w]: two norm-swish-conv steps around a shortcut."""

    def __init__(self, config: AutoencoderConfig, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = _norm(config, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = _norm(config, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """[b, c, h, w] -> the same shape: one attention head over all positions, with a residual."""

    def __init__(self, config: AutoencoderConfig, channels: int):
        super().__init__()
        self.norm = _norm(config, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        h = self.norm(x)
        q, k, v = (proj(h).flatten(2).transpose(1, 2)[:, None] for proj in (self.q, self.k, self.v))  # [b, 1, hw, c]
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(b, c, height, width)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """[b, c, h, w] -> [b, c, h/2, w/2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as in the release


class Upsample(nn.Module):
    """[b, c, h, w] -> [b, c, 2h, 2w]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _mid(config: AutoencoderConfig, channels: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResnetBlock(config, channels, channels)
    mid.attn_1 = AttnBlock(config, channels)
    mid.block_2 = ResnetBlock(config, channels, channels)
    return mid


def _run_mid(mid: nn.Module, h: Tensor) -> Tensor:
    return mid.block_2(mid.attn_1(mid.block_1(h)))


class Encoder(nn.Module):
    """Pictures [b, in, H, W] -> moments [b, 2z, H/d, W/d]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.ch
        for level, mult in enumerate(config.ch_mult):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(config.num_res_blocks):
                stage.block.append(ResnetBlock(config, channels, config.ch * mult))
                channels = config.ch * mult
            if level != len(config.ch_mult) - 1:
                stage.downsample = Downsample(channels)
            self.down.append(stage)
        self.mid = _mid(config, channels)
        self.norm_out = _norm(config, channels)
        self.conv_out = nn.Conv2d(channels, 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)
        return self.conv_out(F.silu(self.norm_out(_run_mid(self.mid, h))))


class Decoder(nn.Module):
    """Unscaled latents [b, z, h, w] -> pictures [b, out, h*d, w*d]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.ch * config.ch_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = _mid(config, channels)
        stages = []
        for level in reversed(range(len(config.ch_mult))):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                stage.block.append(ResnetBlock(config, channels, config.ch * config.ch_mult[level]))
                channels = config.ch * config.ch_mult[level]
            if level != 0:
                stage.upsample = Upsample(channels)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))  # the release counts levels from full resolution
        self.norm_out = _norm(config, channels)
        self.conv_out = nn.Conv2d(channels, config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = _run_mid(self.mid, self.conv_in(z))
        for stage in reversed(self.up):
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Autoencoder(nn.Module):
    """Encoder and decoder with the scalar latent normalisation of the config."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        _check(config)
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode_moments(self, images: Tensor) -> Tensor:
        """Pictures [b, 3, H, W] in [-1, 1] -> [b, 2z, h, w]: mean, then log variance."""
        return self.encoder(images)

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Moments [b, 2z, h, w] and N(0, 1) noise [b, z, h, w] -> normalised latents [b, z, h, w]."""
        mean, logvar = moments.chunk(2, dim=1)
        return self.config.scale_factor * (mean + torch.exp(0.5 * logvar) * noise - self.config.shift_factor)

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latents [b, z, h, w] -> pictures [b, 3, H, W], nominally in [-1, 1] but not clamped."""
        return self.decoder(latent / self.config.scale_factor + self.config.shift_factor)


def patchify(latent: Tensor, p: int) -> Tensor:
    """[z, h, w] -> tokens [h/p * w/p, p*p*z]: row-major tokens, inside a token row, column, channel."""
    z, h, w = latent.shape
    grid = latent.reshape(z, h // p, p, w // p, p)
    return grid.permute(1, 3, 2, 4, 0).reshape((h // p) * (w // p), p * p * z)


def unpatchify(tokens: Tensor, h: int, w: int, p: int) -> Tensor:
    """Tokens [h/p * w/p, p*p*z] -> latent [z, h, w]; the inverse of `patchify`."""
    z = tokens.shape[1] // (p * p)
    grid = tokens.reshape(h // p, w // p, p, p, z)
    return grid.permute(4, 0, 2, 1, 3).reshape(z, h, w)


def load_autoencoder(path: str | Path) -> Autoencoder:
    """Read `ae.safetensors` (a file, or the folder that holds it) and the `ae_params.json` beside it."""
    path = Path(path)
    weights = path / WEIGHTS_NAME if path.is_dir() else path
    if not weights.is_file():
        raise AutoencoderError(f"No autoencoder weights at {weights}.")
    with torch.device("meta"):
        model = Autoencoder(read_autoencoder_config(weights.parent) or AutoencoderConfig())
    state = _read_weights(weights, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _read_weights(weights: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """All expected tensors as float32; the first one that is absent, surplus or misshapen is named in the error."""
    try:
        file = safe_open(weights, framework="pt")
    except SafetensorError as error:
        raise AutoencoderError(f"{weights} is not a readable safetensors file ({error}); fetch it again.") from None
    with file:
        names = set(file.keys())
        for name, shape in expected.items():
            found = tuple(file.get_slice(name).get_shape()) if name in names else "nothing"
            if found != shape:
                raise AutoencoderError(
                    f"{weights}: tensor {name} should have shape {shape} by the config, found {found}."
                )
        surplus = sorted(names - set(expected))
        if surplus:
            raise AutoencoderError(
                f"{weights}: tensor {surplus[0]} is not part of the configured network ({len(surplus)} such)."
            )
        return {name: file.get_tensor(name).float() for name in expected}


def _check(config: AutoencoderConfig) -> None:
    stride = 2 ** (len(config.ch_mult) - 1)
    if config.downsample != stride:
        raise AutoencoderError(
            f"Autoencoder downsample is {config.downsample}, but ch_mult {config.ch_mult} gives {stride} (2 per level)."
        )
    for mult in (1, *config.ch_mult):
        if config.ch * mult % config.num_groups:
            raise AutoencoderError(
                f"{config.ch * mult} autoencoder channels do not divide into {config.num_groups} norm groups."
            )
