"""The autoencoder against the golden numbers of the official code, its latent token order and its loading errors.

It is not about training; the demo autoencoder's training program has no numbers to hold to.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megabagel.config.autoencoder import AutoencoderConfig
from megabagel.models.autoencoder import Autoencoder, load_autoencoder, patchify, unpatchify

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["public-basic", "public-wide"]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_moments_latent_and_decode_match_the_official_code(case):
    model = load_autoencoder(GOLDEN / case / "ckpt")
    batch = load_file(GOLDEN / case / "batch.safetensors")
    expected = load_file(GOLDEN / case / "expected.safetensors")
    moments = model.encode_moments(batch["padded_images"])
    latent = model.sample(expected["vae.moments"], expected["vae.posterior_noise"])
    decoded = model.decode(expected["vae.decode_in"].reshape(1, *expected["vae.decode_in"].shape[-3:]))
    assert relative_error(moments, expected["vae.moments"]) <= 1e-4
    assert relative_error(latent, expected["vae.latent"]) <= 1e-4
    assert relative_error(decoded.reshape(expected["vae.decode_out"].shape), expected["vae.decode_out"]) <= 1e-4


def test_default_config_has_the_downsample_and_names_of_the_release():
    with torch.device("meta"):
        state = Autoencoder(AutoencoderConfig()).state_dict()
    assert state["encoder.down.2.downsample.conv.weight"].shape == (512, 512, 3, 3)
    assert state["encoder.conv_out.weight"].shape == (32, 512, 3, 3)
    assert state["decoder.up.3.upsample.conv.weight"].shape == (512, 512, 3, 3)
    assert sum(value.numel() for value in state.values()) == 83_819_683


def test_patchify_orders_row_column_channel_and_unpatchify_inverts_it():
    latent = torch.arange(3 * 4 * 6).reshape(3, 4, 6)
    tokens = patchify(latent, 2)
    assert tokens.shape == (6, 12)
    assert torch.equal(tokens[1, :3], latent[:, 0, 2])  # second token, first pixel, all channels
    assert torch.equal(tokens[1, 3:6], latent[:, 0, 3])
    assert torch.equal(unpatchify(tokens, 4, 6, 2), latent)


def copy_checkpoint(folder: Path) -> Path:
    for name in ("ae.safetensors", "ae_params.json"):
        shutil.copy(GOLDEN / "public-basic" / "ckpt" / name, folder / name)
        (folder / name).chmod(0o644)
    return folder


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path):
    folder = copy_checkpoint(tmp_path)
    params = json.loads((folder / "ae_params.json").read_text()) | {"z_channels": 8}
    (folder / "ae_params.json").write_text(json.dumps(params))
    with pytest.raises(ValueError, match=r"encoder.conv_out.weight should have shape \(16, .*found \(8, "):
        load_autoencoder(folder)


def test_missing_and_surplus_tensors_are_named(tmp_path):
    folder = copy_checkpoint(tmp_path)
    state = load_file(folder / "ae.safetensors")
    bias = state.pop("decoder.conv_in.bias")
    save_file(state, folder / "ae.safetensors")
    with pytest.raises(ValueError, match="decoder.conv_in.bias .* found nothing"):
        load_autoencoder(folder / "ae.safetensors")
    save_file(state | {"decoder.conv_in.bias": bias, "extra": bias.clone()}, folder / "ae.safetensors")
    with pytest.raises(ValueError, match="tensor extra is not part"):
        load_autoencoder(folder)


def test_inconsistent_downsample_is_refused():
    with pytest.raises(ValueError, match="downsample is 4"):
        Autoencoder(AutoencoderConfig(downsample=4))
