"""How evenly the encode phase spreads a realistic mix of pictures over the ranks of a model replica.

    python tools/bench_encode_balance.py --steps 20

Sizes follow BAGEL's resize rules, costs are counted operations of BAGEL-7B's encoders. Needs no GPU and no weights. The
last line is JSON; a ratio is the largest cost of a rank over the mean (1 is even), averaged over the steps.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import correlation, mean

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]

import torch  # noqa: E402

from megabagel.config.autoencoder import AutoencoderConfig  # noqa: E402
from megabagel.config.datasets import ImageTransformArgs  # noqa: E402
from megabagel.config.schema import Config, ModelConfig  # noqa: E402
from megabagel.data.images import target_size  # noqa: E402
from megabagel.models.autoencoder import Autoencoder  # noqa: E402
from megabagel.models.costs import autoencoder_flops, vision_flops  # noqa: E402
from megabagel.packing.geometry import SpecialTokens, geometry_of  # noqa: E402
from megabagel.runtime.balance import imbalance, spread  # noqa: E402

LAYOUTS = {
    2: (2, 1, 1),
    4: (4, 1, 1),
    8: (4, 1, 2),
    16: (4, 1, 4),
    32: (4, 2, 4),
    64: (4, 2, 8),
}  # tensor, context, pipe
ASPECTS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
VAE_RULE, EDIT_VIT_RULE = ImageTransformArgs(16, 1024, 512), ImageTransformArgs(14, 518, 224)
VLM_RULE = ImageTransformArgs(14, 980, 378, 2_007_040)


@dataclass
class Pack:
    """Width and height of the pictures of one packed sequence."""

    vae: list[tuple[int, int]] = field(default_factory=list)
    vit: list[tuple[int, int]] = field(default_factory=list)
    tokens: int = 0


def draw_pack(draw: random.Random, model: ModelConfig, expected_tokens: int) -> Pack:
    """Samples of the three groups until the pack is full; half of them text to image, a quarter each of the others."""
    shape, pack = geometry_of(model, SpecialTokens(1, 2, 3, 4)), Pack()

    def add(kind: str, width: int, height: int) -> None:
        pack.tokens += (width // shape.stride(kind)) * (height // shape.stride(kind)) + 2
        (pack.vae if kind == "vae_image" else pack.vit).append((width, height))

    while pack.tokens < expected_tokens:
        group, aspect = draw.choices(("t2i", "edit", "vlm"), (2, 1, 1))[0], draw.choice(ASPECTS)
        long = draw.randint(512, 2048) if group != "vlm" else draw.randint(200, 1600)
        size = long * aspect[0] // max(aspect), long * aspect[1] // max(aspect)
        if group == "vlm":
            add("vit_image", *target_size(*size, VLM_RULE))
        else:
            if group == "edit":  # the source enters clean and to be seen, the target noised
                add("vae_image", *target_size(*size, VAE_RULE))
                add("vit_image", *target_size(*size, EDIT_VIT_RULE))
            add("vae_image", *target_size(*size, VAE_RULE))
        pack.tokens += draw.randint(20, 200)  # text
    return pack


def vae_costs(pack: Pack, model: ModelConfig) -> list[int]:
    """Operations of the autoencoder for each of the pack's pictures."""
    return [autoencoder_flops(model.vae, height, width) for width, height in pack.vae]


def vit_costs(pack: Pack, model: ModelConfig) -> list[int]:
    """Operations of the vision tower for each of the pack's pictures."""
    return [vision_flops(model.vit, width * height // model.vit.patch_size**2) for width, height in pack.vit]


def one_step(packs: list[Pack], layout: tuple[int, int, int], model: ModelConfig) -> dict[str, float]:
    """Largest over mean cost of a rank, by way of placing the pictures."""
    tensor, context, pipe = layout
    stage, ranks = tensor * context, tensor * context * pipe
    vae = [cost for pack in packs for cost in vae_costs(pack, model)]
    both = vae + [cost for pack in packs for cost in vit_costs(pack, model)]
    # a ViT that trains: every micro-batch waits for the slowest rank of the first stage
    slowest = total = 0.0
    for pack in packs:
        costs = vit_costs(pack, model)
        share = imbalance(costs, spread(costs, stage), stage)
        slowest += (share or 0) * sum(costs)
        total += sum(costs)
    return {
        "spread": imbalance(vae, spread(vae, ranks), ranks),
        "spread with frozen ViT": imbalance(both, spread(both, ranks), ranks),
        "in turn over the first stage": imbalance(vae, [index % stage for index in range(len(vae))], ranks),
        "one rank": imbalance(vae, [0] * len(vae), ranks),
        "ViT that trains": slowest / total,
    }


def agreement_with_time(repeats: int = 5) -> float:
    """Correlation of counted operations with seconds of a small autoencoder on one CPU thread, over picture sizes."""
    torch.set_num_threads(1)
    config = AutoencoderConfig(ch=32, ch_mult=(1, 2, 4, 4))
    network = Autoencoder(config).eval()
    costs, seconds = [], []
    for height, width in ((64, 64), (64, 128), (128, 128), (128, 192), (192, 192), (192, 256), (256, 256)):
        picture, best = torch.zeros(1, 3, height, width), float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            with torch.no_grad():
                network.encode_moments(picture)
            best = min(best, time.perf_counter() - start)
        costs.append(autoencoder_flops(config, height, width))
        seconds.append(best)
    return correlation(costs, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps to average over")
    parser.add_argument("--micro-batches", type=int, default=4, help="packs per step and pipeline stage")
    parser.add_argument("--expected-num-tokens", type=int, default=32768, help="tokens per pack")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--time", action="store_true", help="also compare operations with seconds on this machine's CPU"
    )
    options = parser.parse_args()
    model, ratios = Config().model, {}
    heads = ("ranks", "TP x CP x PP", "packs", "VAE pictures", "spread", "spread with frozen ViT")
    print(f"| {' | '.join(heads)} | in turn over first stage | on one rank | ViT that trains |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for ranks, layout in LAYOUTS.items():
        draw, number = random.Random(options.seed), options.micro_batches * layout[2]
        steps = [
            [draw_pack(draw, model, options.expected_num_tokens) for _ in range(number)] for _ in range(options.steps)
        ]
        results = [one_step(packs, layout, model) for packs in steps]
        means = {name: mean(result[name] for result in results) for name in results[0]}
        pictures = mean(sum(len(pack.vae) for pack in packs) for packs in steps)
        sizes = " x ".join(map(str, layout))
        print(
            f"| {ranks} | {sizes} | {number} | {pictures:.0f} | "
            + " | ".join(f"{v:.2f}" for v in means.values())
            + " |"
        )
        ratios |= {f"{name}, {ranks} ranks": round(value, 4) for name, value in means.items()}
    print("ViT that trains: per pack over the TP x CP ranks of the first stage, of which each would else do everything")
    units = dict.fromkeys(ratios, "largest cost of a rank / mean cost")
    if options.time:
        agreement = agreement_with_time()
        print(f"operations against seconds of a small autoencoder on this CPU: correlation {agreement:.4f}")
        ratios["operations against seconds"], units["operations against seconds"] = round(agreement, 4), "correlation"
    print(json.dumps({"bench": "encode_balance", "ratios": ratios, "units": units}))


if __name__ == "__main__":
    main()
