"""Ask a model: `python -m megabagel.generate --model FOLDER --prompt TEXT`, alone or under torchrun.

Without --out the answer is printed; with --out a picture is made, an edit where --image is given:

    python -m megabagel.generate --model BAGEL-7B-MoT --prompt "A blue house beside a lake." --out house.png
    python -m megabagel.generate --model BAGEL-7B-MoT --image house.png --prompt "Make it red." --out red.png
    python -m megabagel.generate --model runs/mine --image house.png --prompt "What colour is the house?"
    torchrun --standalone --nproc_per_node 4 -m megabagel.generate --model ...   (the model split over four processes)
"""

import argparse
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from megabagel.checkpoint.errors import CheckpointError
from megabagel.config.errors import ConfigError
from megabagel.data.faults import DataError, DataFault
from megabagel.data.images import decode
from megabagel.inference import FlowSettings, Generator, TextSettings, load
from megabagel.inference.options import flow_settings, model_settings, parser, text_settings
from megabagel.inference.png import save_png
from megabagel.models.autoencoder import AutoencoderError
from megabagel.runtime import distributed, failure


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(argv)
    with failure.guard(ConfigError, DataError, DataFault, CheckpointError, AutoencoderError):
        if options.samples < 1:
            raise ConfigError(f"--samples {options.samples} asks for nothing; it must be at least 1.")
        if options.turns and options.out is None:
            raise ConfigError("--turns makes pictures: say with --out where they go.")
        text, flow = text_settings(options), flow_settings(options)
        shown = [decode(path) for path in options.image]
        bagel = load(options.model, **model_settings(options))
        samples = respond(bagel, [*shown, options.prompt], text, flow, options)
        if dist.get_rank() == 0:
            write(samples, options)
        distributed.destroy()


def respond(
    bagel: Generator, prompt: list, text: TextSettings, flow: FlowSettings, options: argparse.Namespace
) -> list[list]:
    """The texts and pictures of every sample."""
    prompts = [prompt] * options.samples
    common = {"seeds": seeds(options), "system_prompt": options.system_prompt}
    if options.out is None:
        return [[answer] for answer in bagel.answers(prompts, text, think=options.think, **common)]
    common |= {"height": options.height, "width": options.width}
    pictures = options.turns.count("picture") if options.turns else 1
    with tqdm(total=pictures * (flow.num_timesteps - 1), desc="steps", disable=dist.get_rank() != 0) as bar:
        common["on_step"] = lambda *_: bar.update()
        if options.turns:
            return bagel.interleaved(prompts, options.turns, flow, text, **common)
        drawn = bagel.pictures(prompts, flow, think=options.think, thinking=text, **common)
    return [[part for part in (one.thought, one.image) if part is not None] for one in drawn]


def seeds(options: argparse.Namespace) -> range:
    """Of the samples."""
    return range(options.seed, options.seed + options.samples)


def write(samples: list[list], options: argparse.Namespace) -> None:
    """Print texts; save pictures, numbered if there are several."""
    several = sum(not isinstance(part, str) for parts in samples for part in parts) > 1
    number = 0
    for seed, parts in zip(seeds(options), samples, strict=True):
        for part in parts:
            if isinstance(part, str):
                print(part)
                continue
            out = Path(options.out)
            out = out.with_name(f"{out.stem}_{number}{out.suffix}") if several else out
            number += 1
            save_png(part, out, options.prompt, seed, vars(options))
            print(f"{part.height} x {part.width} pixels in {out}")


if __name__ == "__main__":
    main()
