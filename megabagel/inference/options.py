"""The options of `megabagel.generate` and the settings that they ask for. It loads nothing."""

import argparse

from megabagel.inference.flow import FlowSettings
from megabagel.inference.guidance import Guidance
from megabagel.inference.text import TextSettings


def parser(description: str) -> argparse.ArgumentParser:
    """`description`: what the program does, with examples."""
    result = argparse.ArgumentParser("megabagel.generate", description=description, formatter_class=Help)
    add = result.add_argument
    add("--model", required=True, help="BAGEL folder, run folder or iter_... folder")
    add("--prompt", required=True, help="what is asked or wished")
    add("--image", nargs="+", default=[], help="pictures that come before the prompt")
    add("--out", help="PNG file to make; several are numbered")
    add("--think", action="store_true", help="reasoning comes first, and is printed")
    add("--system-prompt", help="text before everything; --think has one of its own")
    add("--turns", nargs="+", choices=("text", "picture"), help="make these in turn, each read before the next one")
    add("--samples", type=int, default=1, help="answers or pictures, with seeds from --seed on")
    add("--seed", type=int, default=0)
    add("--height", type=int, help="default: that of the last --image, else the largest")
    add("--width", type=int)
    add_flow_options(result)
    add("--max-tokens", type=int, default=512, help="of a text")
    add("--temperature", type=float, default=0.0, help="0: always the most likely token")
    add("--top-p", type=float, default=1.0, help="draw only from the most likely tokens of this probability")
    add_model_options(result)
    return result


def add_flow_options(parser: argparse.ArgumentParser) -> None:
    """How pictures are made; see `flow_settings`."""
    add = parser.add_argument
    add("--num-timesteps", type=int, default=50, help="times from noise to picture; one step less")
    add("--timestep-shift", type=float, default=3.0, help="above 1: smaller steps while there is much noise")
    add("--cfg-text-scale", type=float, default=4.0, help="guidance by the prompt; 1: off")
    add("--cfg-img-scale", type=float, default=1.5, help="guidance by the pictures; 1: off")
    add("--cfg-interval", type=float, nargs=2, default=(0.4, 1.0), metavar=("LOW", "HIGH"), help="times with guidance")
    add("--cfg-renorm", choices=("global", "channel", "text_channel"), default="global", help="how its length is bound")
    add("--cfg-renorm-min", type=float, default=0.0, help="least factor of that")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What `load` is told beside the model's folder."""
    add = parser.add_argument
    add("--weights", choices=("ema", "model"), default="ema", help="moving average or live weights")
    add("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--tokenizer", help="folder; default: that of the model")
    add("--autoencoder", help="folder or file; default: that of the model")


def model_settings(options: argparse.Namespace) -> dict[str, str | bool | None]:
    """What `load` takes beside the folder, from the options of `add_model_options`."""
    return {
        "load_ema": options.weights == "ema",
        "dtype": options.dtype,
        "tokenizer": options.tokenizer,
        "autoencoder": options.autoencoder,
    }


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown, the examples' line breaks kept."""


def text_settings(options: argparse.Namespace) -> TextSettings:
    """Of answers and of thoughts."""
    return TextSettings(options.max_tokens, options.temperature, options.top_p)


def flow_settings(options: argparse.Namespace) -> FlowSettings:
    """Of pictures."""
    guidance = Guidance(
        options.cfg_text_scale,
        options.cfg_img_scale,
        tuple(options.cfg_interval),
        options.cfg_renorm,
        options.cfg_renorm_min,
    )
    return FlowSettings(options.num_timesteps, options.timestep_shift, guidance)
