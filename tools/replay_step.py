"""Runs the packs of a step whose loss or gradient was not finite again and says where numbers first are not finite.

One process does it, whatever the layout of the run was; a 7B model wants a GPU of 40 GB or that much memory. The
weights are those of a checkpoint, if possible the last one before the step: what depends on the very weights of the
step may not show with others.

    python tools/replay_step.py runs/a/nonfinite/step_0000123/rank0.pt --checkpoint runs/a/iter_0000120
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, when it is not installed

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.hf import load_weights, open_source
from megabagel.config.errors import ConfigError
from megabagel.config.load import load_config
from megabagel.config.paths import autoencoder_path
from megabagel.config.schema import Config, ParallelConfig
from megabagel.data.pack import Pack
from megabagel.models.autoencoder import AutoencoderError, load_autoencoder
from megabagel.models.bagel import Bagel
from megabagel.models.build import DTYPES, build_stages
from megabagel.models.vision import is_frozen
from megabagel.runtime.distributed import Layout, destroy, initialize
from megabagel.training.encode import Encoder
from tools.replay.watch import Seen, Watch, first_bad

BEFORE = 3  # modules that are shown before the one that breaks


def one_process(config_yaml: str, checkpoint: str) -> Config:
    """The settings of the run for one process that starts from `checkpoint`. Raises ConfigError."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(config_yaml)
        file.flush()
        config = load_config(["--config", file.name])
    config.parallel = ParallelConfig()
    config.training.recompute_granularity, config.training.recompute_vit = None, False
    config.checkpoint.init_vae = str(autoencoder_path(config)) if config.model.visual_gen else None
    config.checkpoint.init_from, config.checkpoint.load_ema = checkpoint, False
    return config


def build(config: Config, layout: Layout) -> tuple[Bagel, Encoder]:
    """Raises CheckpointError and AutoencoderError."""
    (stage,) = build_stages(config, layout.device)
    source = open_source(config)
    load_weights([stage], source)
    source.close()
    autoencoder = None
    if config.model.visual_gen:
        autoencoder = load_autoencoder(autoencoder_path(config)).to(layout.device, DTYPES[config.training.params_dtype])
    return stage, Encoder(config, layout, autoencoder, stage.vision if is_frozen(config.model) else None)


def replay(pack: Pack, stage: Bagel, encoder: Encoder, config: Config) -> list[str]:
    """Forward and backward of one pack; lines about what is not finite, none when all is."""
    (inputs,) = encoder([pack])
    if bad := int((~inputs.latents.isfinite()).sum()):
        return [
            f"  the latents of its pictures: {bad} of {inputs.latents.numel()} values are not finite, before the model"
        ]
    training = config.training
    with Watch(stage) as watch:
        losses = stage(pack.plan, inputs)
        ce = losses.ce / max(pack.plan.ce_rows.numel(), 1)
        mse = losses.mse / max(pack.plan.mse_rows.numel(), 1)
        if (place := first_bad(watch.outputs)) is not None:
            return [
                f"  ce {ce.item():.6g}, mse {mse.item():.6g}; the first output that is not finite:",
                *_around(watch.outputs, place),
            ]
        (training.ce_weight * ce + training.mse_weight * mse).backward()
    if (place := first_bad(watch.gradients)) is not None:
        return [
            "  the losses are finite; the first gradient of an output that is not:",
            *_around(watch.gradients, place),
        ]
    named = [n for n, p in stage.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if named:
        return [f"  the losses are finite, the gradient of {named[0]} is not ({len(named)} parameters in all)"]
    return []


def _around(seen: list[Seen], place: int) -> list[str]:
    return [f"  {'->' if n == place else '  '} {seen[n]}" for n in range(max(0, place - BEFORE), place + 1)]


def run(file: Path, checkpoint: str, say: Callable[[str], None] = print) -> int:
    """Says what it finds; 0 when something is not finite, 2 when all is. Raises what `build` raises, and OSError."""
    content = torch.load(file, map_location="cpu", weights_only=False)
    config = one_process(content["config_yaml"], checkpoint)
    layout = initialize(config.parallel, config.training.seed)
    stage, encoder = build(config, layout)
    bad = [name for name, parameter in stage.named_parameters() if not parameter.isfinite().all()]
    say(f"step {content['step']}, {len(content['packs'])} packs; weights of {checkpoint}")
    if bad:
        say(f"{len(bad)} parameters of that checkpoint are not finite themselves, the first is {bad[0]}")
    found = bool(bad)
    for number, pack in content["packs"].items():
        say(f"pack {number}: {len(pack.keys)} samples, {pack.plan.sequence_length} tokens")
        for group, origin in zip(pack.groups, pack.origins, strict=True):
            say(f"  {group} {origin}")
        lines = replay(pack, stage, encoder, config)
        say("\n".join(lines) or "  all is finite with these weights")
        stage.zero_grad()
        found |= bool(lines)
    destroy()
    return 0 if found else 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="RUN_DIR/nonfinite/step_.../rank....pt; it is unpickled: trust it")
    parser.add_argument("--checkpoint", required=True, help="run folder, iter_... folder or BAGEL folder")
    options = parser.parse_args(argv)
    try:
        return run(options.file, options.checkpoint)
    except (ConfigError, CheckpointError, AutoencoderError, OSError) as error:
        sys.exit(f"replay_step.py: {error}")


if __name__ == "__main__":
    sys.exit(main())
