"""Trains the small FLUX-shaped autoencoder of the demo on 64 px emojis and easy-vqa pictures, on one CPU core.

It renders, trains, measures PSNR on held-out emojis and writes `ae.safetensors` + `ae_params.json`.
It is not part of the trainer and not meant for real autoencoders: everything fits in memory, nothing is distributed.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megabagel.config.autoencoder import AutoencoderConfig
from megabagel.config.folder import AUTOENCODER_PARAMS
from megabagel.models.autoencoder import WEIGHTS_NAME, Autoencoder, ResnetBlock, load_autoencoder
from tools.demo.emojis import is_held_out, list_emojis, render_emoji
from tools.demo.packages import fetch_packages
from tools.demo.questions import vqa_pictures

EXAMPLE = """example:
  python tools/train_demo_autoencoder.py --out examples/demo/autoencoder --minutes 60
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, help="train, and write the weights to this folder")
    task.add_argument("--evaluate", type=Path, help="train nothing: print the held-out scores of this folder's weights")
    parser.add_argument("--start-from", type=Path, help="folder of weights to train on; the shape is then theirs")
    parser.add_argument("--cache", type=Path, default=Path("data/cache"), help="packages and rendered pictures")
    parser.add_argument("--pictures", choices=["emojis", "all"], default="emojis", help="all: easy-vqa's pictures too")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time; the schedule follows the clock")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 4, 6])
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16, help="pictures a step; crops come twice as many")
    parser.add_argument("--crop-part", type=float, default=0.5, help="first part of the time, on 32x32 crops")
    parser.add_argument("--lr", type=float, default=0.02, help="peak rate of the orthogonalised (matrix) updates")
    parser.add_argument("--adam-lr", type=float, default=2e-3, help="peak rate of AdamW (norms, biases, outer layers)")
    parser.add_argument("--kl", type=float, default=3e-3, help="weight of the KL term, averaged over latent values")
    parser.add_argument("--evaluate-every", type=float, default=240.0, help="seconds between evaluations and snapshots")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# ---------------------------------------------------------------- pictures


def load_pictures(cache: Path, choice: str) -> tuple[Tensor, Tensor]:
    """Training and held-out pictures, uint8 [n, 3, 64, 64]; rendered once, then read from the cache."""
    file = cache / "autoencoder_64.npz"
    if not file.exists():
        fetch_packages(cache)
        sets: dict[str, list[np.ndarray]] = {"emojis": [], "held_out": []}
        for e in list_emojis():
            sets["held_out" if is_held_out(e.base) else "emojis"].append(render_emoji(e.svg, 64))
        sets["vqa"] = [picture for _, picture in vqa_pictures("train")]
        np.savez_compressed(file, **{name: np.stack(pictures) for name, pictures in sets.items()})
    with np.load(file) as arrays:
        names = ("emojis", "vqa") if choice == "all" else ("emojis",)
        train, held_out = np.concatenate([arrays[name] for name in names]), arrays["held_out"]
    return tuple(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() for pictures in (train, held_out))


def normalise(pictures: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1], channels last in memory, which CPU convolutions prefer."""
    return (pictures.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


def full_batch(pictures: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count, 3, 64, 64]: random pictures, flipped half the time and moved by up to 3 px over white."""
    chosen = pictures[torch.randint(len(pictures), (count,), generator=generator)]
    chosen = chosen.flip(3) if torch.rand((), generator=generator) < 0.5 else chosen
    top, left = torch.randint(7, (2,), generator=generator).tolist()
    return normalise(F.pad(chosen, (3, 3, 3, 3), value=255)[:, :, top : top + 64, left : left + 64])


def crop_batch(pictures: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count, 3, 32, 32]: of twice as many random crops the half with more in it (most of a picture is white)."""
    index = torch.randint(len(pictures), (2 * count,), generator=generator)
    corner = torch.randint(33, (2 * count, 2), generator=generator).tolist()
    crops = torch.stack([pictures[i, :, y : y + 32, x : x + 32] for i, (y, x) in zip(index, corner, strict=True)])
    filled = (crops.amin(1) < 250).float().mean((1, 2)) + 0.3 * torch.rand(2 * count, generator=generator)
    return normalise(crops[filled.topk(count).indices])


# ---------------------------------------------------------------- loss


def loss_of(model: Autoencoder, images: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Training loss and plain MSE for pictures [b, 3, h, w]; decodes a posterior sample, as every user will."""
    mean, logvar = model.encode_moments(images).chunk(2, dim=1)
    logvar = logvar.clamp(-20.0, 4.0)
    restored = model.decoder(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
    difference = restored - images
    drawn = F.max_pool2d((images.amin(1, keepdim=True) < 0.97).float(), 5, stride=1, padding=2)
    weight = 0.4 + drawn  # background counts less, but stays white
    weight = weight / weight.mean()
    colour = F.avg_pool2d(difference, 4).square().mean()  # a wrong tint over an area is worse than a soft edge
    squared = difference.square()
    rebuild = (weight * (0.5 * difference.abs() + 4.0 * squared)).mean() + 4.0 * colour
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    return rebuild + kl_weight * kl, squared.mean().detach()


# ---------------------------------------------------------------- optimiser


def orthogonalise(matrix: Tensor) -> Tensor:
    """Newton-Schulz: the nearest semi-orthogonal matrix, roughly (singular values within 0.7 .. 1.2)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised per convolution."""

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                buffer = state.setdefault("buffer", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"]).flatten(1)
                rows, columns = update.shape
                scale = math.sqrt(max(1.0, rows / columns))
                parameter.add_(orthogonalise(update).view_as(parameter), alpha=-group["lr"] * scale)


def build_optimisers(model: Autoencoder, lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    outer = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 4 and not name.startswith(outer) else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    optimisers = [Muon(matrices, lr), adam]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return optimisers


def rate(progress: float) -> float:
    """Linear warm-up over 2% of the run, then cosine down to 1%."""
    return min(progress / 0.02, 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))


# ---------------------------------------------------------------- evaluation and saving


def psnr(restored: Tensor, images: Tensor) -> Tensor:
    """Per picture, in dB: both [n, 3, h, w] in [-1, 1]; the restored one is clamped first, as when it is shown."""
    error = (restored.clamp(-1, 1) - images).square().mean((1, 2, 3)) / 4.0
    return -10.0 * torch.log10(error.clamp_min(1e-10))


@torch.no_grad()
def evaluate(model: Autoencoder, held_out: Tensor) -> dict[str, float]:
    """PSNR mean, median and worst tenth, and the error of each colour channel's mean (of 255), on held-out emojis."""
    generator = torch.Generator().manual_seed(1)
    values, tint = [], []
    for chunk in held_out.split(32):
        images = normalise(chunk)
        moments = model.encode_moments(images)
        noise = torch.randn(moments.shape[0], moments.shape[1] // 2, *moments.shape[2:], generator=generator)
        restored = model.decode(model.sample(moments, noise))
        values.append(psnr(restored, images))
        tint.append(127.5 * (restored.clamp(-1, 1) - images).mean((2, 3)))
    values, tint = torch.cat(values), torch.cat(tint)
    return {
        "psnr_mean": values.mean().item(),
        "psnr_median": values.median().item(),
        "psnr_worst_tenth": values.quantile(0.1).item(),
        "mean_colour_error": tint.abs().mean(0).tolist(),
        "mean_colour_bias": tint.mean(0).tolist(),
    }


@torch.no_grad()
def fold_latent_scale(model: Autoencoder, pictures: Tensor) -> Autoencoder:
    """Per-channel latent scale folded into the weights, the common rest into scale_factor and shift_factor.

    A flow model wants latents of mean 0 and variance 1. A channel's scale passes exactly through the encoder's last and
    the decoder's first convolution; its mean does not (zero padding), so one scalar shift is left for the config.
    """
    means, variances = [], []
    for chunk in pictures[:: max(1, len(pictures) // 1024)].split(32):
        mean, logvar = model.encode_moments(normalise(chunk)).chunk(2, dim=1)
        means.append(mean)
        variances.append(logvar.exp())
    means, variances = torch.cat(means), torch.cat(variances)
    total = (means.var((0, 2, 3)) + variances.mean((0, 2, 3))).sqrt()
    z = total.numel()
    out, into = model.encoder.conv_out, model.decoder.conv_in
    out.weight[:z] /= total[:, None, None, None]
    out.bias[:z] /= total
    out.bias[z:] -= 2.0 * total.log()
    into.weight *= total[None, :, None, None]
    means /= total[None, :, None, None]
    shift = means.mean().item()
    spread = (means.var() + (variances / total[None, :, None, None].square()).mean()).sqrt().item()
    model.config = replace(model.config, scale_factor=round(1.0 / spread, 4), shift_factor=round(shift, 4))
    return model


def snapshot(ema: dict[str, Tensor], config: AutoencoderConfig) -> Autoencoder:
    model = Autoencoder(config).eval()
    model.load_state_dict({name: value.clone() for name, value in ema.items()})
    return model


def save(model: Autoencoder, out: Path) -> None:
    """fp16 halves the file; the weights are near one in size, so nothing is lost that a picture shows."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, out / WEIGHTS_NAME)
    (out / AUTOENCODER_PARAMS).write_text(json.dumps(asdict(model.config), indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- training


def train(model: Autoencoder, pictures: Tensor, held_out: Tensor, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    optimisers = build_optimisers(model, options.lr, options.adam_lr)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    start = reported = time.monotonic()
    step, running = 0, 0.0
    while (progress := (time.monotonic() - start) / (60 * options.minutes)) < 1.0:
        on_crops = progress < options.crop_part
        take = crop_batch if on_crops else full_batch
        images = take(pictures, options.batch * (2 if on_crops else 1), generator)
        loss, squared = loss_of(model, images, options.kl * min(1.0, progress / 0.2))
        loss.backward()
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate(progress)
            optimiser.step()
            optimiser.zero_grad()
        step += 1
        decay = min(0.998, 1.0 - 1.0 / (1 + step / 10))
        for name, value in model.state_dict().items():
            ema[name].lerp_(value, 1.0 - decay)
        running += (squared.item() - running) / min(step, 50)
        if time.monotonic() - reported > options.evaluate_every:
            reported = time.monotonic()
            report(step, progress, running, snapshot(ema, model.config), pictures, held_out, options.out)
    report(step, 1.0, running, snapshot(ema, model.config), pictures, held_out, options.out)


def report(step, progress, running, model, pictures, held_out, out) -> None:
    model = fold_latent_scale(model, pictures)
    save(model, out)
    scores = {name: np.round(value, 3).tolist() for name, value in evaluate(model, held_out).items()}
    line = {"step": step, "progress": round(progress, 4), "train_mse_db": round(-10 * math.log10(running / 4), 2)}
    line |= scores | {"scale": model.config.scale_factor, "shift": model.config.shift_factor}
    print(json.dumps(line), flush=True)
    with open(out / "training.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)
    pictures, held_out = load_pictures(options.cache, options.pictures)
    if options.evaluate:
        print(json.dumps(evaluate(load_autoencoder(options.evaluate), held_out), indent=2))
        return
    config = AutoencoderConfig(
        resolution=64,
        ch=options.channels,
        ch_mult=tuple(options.multipliers),
        downsample=2 ** (len(options.multipliers) - 1),
        num_res_blocks=1,
        num_groups=options.groups,
        scale_factor=1.0,
        shift_factor=0.0,
    )
    model = load_autoencoder(options.start_from).train() if options.start_from else Autoencoder(config)
    model = model.requires_grad_(True).to(memory_format=torch.channels_last)
    for module in model.modules():  # residual branches start at zero: the net starts as a short linear one
        if isinstance(module, ResnetBlock) and not options.start_from:
            torch.nn.init.zeros_(module.conv2.weight)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, {len(pictures)} training and {len(held_out)} held-out pictures", flush=True)
    train(model, pictures, held_out, options)


if __name__ == "__main__":
    main()
