"""The autoencoder of a case against its saved moments, latents and pictures. Runs on one rank; no language model."""

import torch

from megabagel.models.autoencoder import Autoencoder, load_autoencoder, unpatchify
from parity.case import Case
from parity.compare import Report, compare


@torch.no_grad()
def check_autoencoder(case: Case, report: Report, tolerance: float) -> None:
    """Encode the padded pictures of the batch and decode a latent, all as the reference did."""
    expected, batch = case.expected, case.batch
    group = report.group("vae", tolerance)
    if not any(name.startswith("vae.") for name in expected):
        return
    model = load_autoencoder(case.checkpoint)
    if "padded_images" in batch and len(batch["padded_images"]):
        moments = model.encode_moments(batch["padded_images"])
        compare(group, "vae.moments", moments, expected["vae.moments"])
        compare(group, "vae.latent", model.sample(moments, expected["vae.posterior_noise"]), expected["vae.latent"])
    if "vae.decode_in" in expected:
        compare(group, "vae.decode_out", model.decode(expected["vae.decode_in"]), expected["vae.decode_out"])
    _check_pictures(case, model, report, tolerance)


def _check_pictures(case: Case, model: Autoencoder, report: Report, tolerance: float) -> None:
    """The condition picture and the generated pictures of the inference part, as far as the autoencoder makes them."""
    expected = case.expected
    group = report.group("vae", tolerance)
    if "infer.edit.cond_latent" in expected:
        pixels = (expected["infer.edit.vae_image"].permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
        latent = model.sample(model.encode_moments(pixels), expected["infer.edit.cond_posterior_noise"])
        compare(group, "infer.edit.cond_latent", latent, expected["infer.edit.cond_latent"])
    for kind in ("t2i", "edit"):
        latent = expected.get(f"infer.{kind}.latent")
        if latent is None:
            continue
        compare(group, f"infer.{kind}.image_float", model.decode(latent)[0], expected[f"infer.{kind}.image_float"])
        patch = case.meta["config"]["latent_patch_size"]
        grid = unpatchify(expected[f"infer.{kind}.latent_tokens"], *latent.shape[-2:], patch)
        compare(group, f"infer.{kind}.latent_tokens", grid, latent[0])
