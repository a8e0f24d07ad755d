"""Floating-point operations of encoding one picture, by which pictures are spread over ranks.

Forward pass, matrix products and convolutions only, a multiply and an add count as two. A step's whole count is
elsewhere: the pictures of the frozen autoencoder never enter it.
"""

from functools import lru_cache

from megabagel.config.autoencoder import AutoencoderConfig
from megabagel.config.schema import VisionConfig


@lru_cache(maxsize=4096)
def autoencoder_flops(config: AutoencoderConfig, height: int, width: int) -> int:
    """Of the autoencoder's encoder on one picture: convolutions grow with pixels, attention with their square."""
    pixels, channels = height * width, config.ch
    flops = _conv(pixels, config.in_channels, channels)
    for level, multiple in enumerate(config.ch_mult):
        for _ in range(config.num_res_blocks):
            flops += _res_block(pixels, channels, config.ch * multiple)
            channels = config.ch * multiple
        if level != len(config.ch_mult) - 1:
            pixels //= 4
            flops += _conv(pixels, channels, channels)
    flops += 2 * _res_block(pixels, channels, channels)
    flops += 4 * _conv(pixels, channels, channels, side=1) + 4 * pixels**2 * channels
    return flops + _conv(pixels, channels, 2 * config.z_channels)


def vision_flops(config: VisionConfig, tokens: int) -> int:
    """Of the vision tower on one picture of so many patches."""
    hidden = config.hidden_size
    layer = 2 * tokens * (4 * hidden**2 + 2 * hidden * config.ffn_hidden_size) + 4 * tokens**2 * hidden
    return config.num_layers * layer + 2 * tokens * 3 * config.patch_size**2 * hidden


def _conv(pixels: int, channels_in: int, channels_out: int, side: int = 3) -> int:
    return 2 * pixels * channels_in * channels_out * side**2


def _res_block(pixels: int, channels_in: int, channels_out: int) -> int:
    shortcut = _conv(pixels, channels_in, channels_out, side=1) if channels_in != channels_out else 0
    return _conv(pixels, channels_in, channels_out) + _conv(pixels, channels_out, channels_out) + shortcut
