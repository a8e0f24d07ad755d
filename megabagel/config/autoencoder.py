"""Shape of the image autoencoder: the fields of `ae_params.json`. The network itself is in `models/autoencoder.py`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AutoencoderConfig:
    """FLUX-style autoencoder; the defaults are those of the released FLUX weights that BAGEL uses."""

    resolution: int = 256
    in_channels: int = 3
    downsample: int = 8  # picture pixels per latent pixel, per side
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159
    num_groups: int = 32
