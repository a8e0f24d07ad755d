"""Rules about `config.samples` and the file of requests that it names."""

from collections.abc import Iterator
from pathlib import Path

from megabagel.config.requests import Request, read_entries
from megabagel.config.schema import Config


def samples_faults(config: Config) -> Iterator[str]:
    """Faults in order of importance. May raise ConfigError itself where the file cannot be used."""
    samples, parallel = config.samples, config.parallel
    for name in ("interval", "seed"):
        if (value := getattr(samples, name)) < 0:
            yield f"samples.{name} is {value}, but must not be negative."
    if samples.interval == 0:
        return
    for name, least in (("batch_size", 1), ("max_tokens", 1), ("num_timesteps", 2)):
        if (value := getattr(samples, name)) < least:
            yield f"samples.{name} is {value}, but must be at least {least}."
    if not samples.timestep_shift > 0:
        yield f"samples.timestep_shift is {samples.timestep_shift}, but must be greater than 0."
    if samples.prompts_file is None:
        yield (
            f"samples.interval is {samples.interval}, but samples.prompts_file is not set; give a YAML or JSONL file "
            "of prompts and questions, or set the interval to 0."
        )
    for name in ("pipeline_model_parallel_size", "expert_model_parallel_size"):
        if (size := getattr(parallel, name)) > 1:
            yield (
                f"samples.interval is {samples.interval}, but parallel.{name} is {size}: samples are made only where "
                f"every process holds all layers and experts; set the interval to 0 and run megabagel.generate on the "
                "checkpoints, or set that size to 1."
            )
    if samples.weights == "ema" and config.optimizer.ema_decay is None:
        yield (
            "samples.weights is ema, but optimizer.ema_decay null keeps no moving average; set a decay, or weights "
            "to model."
        )
    yield from _requests(config, samples.prompts_file)


def _requests(config: Config, file: str) -> Iterator[str]:
    """What the model cannot do."""
    model = config.model
    stride = model.vae.downsample * model.latent_patch_size
    for number, request in enumerate(read_entries(Path(file), Request, "samples.prompts_file"), 1):
        where = f"samples.prompts_file: {file}, entry {number}"
        if request.draws and not model.visual_gen:
            yield f"{where} asks for a picture, but model.visual_gen is false; remove it or set that to true."
        if request.images and not request.draws and not model.visual_und:
            yield f"{where} shows a picture, but model.visual_und is false; remove it or set that to true."
        for side in (request.height, request.width):
            if side is not None and (side < stride or side % stride or side > stride * model.max_latent_size):
                yield (
                    f"{where}: a side of {side} pixels cannot be made; it must be a multiple of {stride} from {stride} "
                    f"to {stride * model.max_latent_size}."
                )
