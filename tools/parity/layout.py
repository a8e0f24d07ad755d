"""The layout that check_parity.py's options ask for, as configuration. It starts no processes and reads no case."""

import argparse
import dataclasses
from math import gcd

from megabagel.config.schema import ParallelConfig, TrainingConfig

_SIZES = {
    "tensor_model_parallel_size": "ranks that split every layer",
    "pipeline_model_parallel_size": "ranks that split the stack of layers",
    "virtual_pipeline_model_parallel_size": "interleaved pieces of the stack per rank",
    "num_layers_in_first_pipeline_stage": "default: as many as the others",
    "num_layers_in_last_pipeline_stage": "default: as many as the others",
    "context_parallel_size": "ranks that split every pack's tokens",
    "expert_model_parallel_size": "ranks that hold different MLPs: und's and gen's",
    "und_expert_ranks": "of those ranks, how many hold und's MLPs; default: half",
}
_SWITCHES = {
    "sequence_parallel": "shard activations over the tensor-parallel ranks",
    "overlap_grad_reduce": "reduce gradients while the backward pass runs",
    "overlap_param_gather": "gather updated parameters while the forward pass runs",
    "recompute_vit": "recompute the layers of the ViT",
}
_TRAINING = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules", "recompute_vit")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every dimension of parallelism, named as the settings of a run are."""
    parallel, training = ParallelConfig(), TrainingConfig()
    for name, text in _SIZES.items():
        parser.add_argument(_flag(name), type=_size, default=getattr(parallel, name), metavar="N", help=text)
    text = "model replicas; default: as few as the expert-parallel size allows"
    parser.add_argument("--data-parallel-size", type=_size, metavar="N", help=text)
    parser.add_argument("--pipeline-split", choices=("even", "auto"), default=parallel.pipeline_split)
    for name, text in _SWITCHES.items():
        parser.add_argument(_flag(name), action="store_true", help=text)
    parser.add_argument("--recompute-granularity", choices=("full", "selective"))
    parser.add_argument("--recompute-method", choices=("uniform", "block"), default=training.recompute_method)
    parser.add_argument("--recompute-num-layers", type=_size, default=training.recompute_num_layers, metavar="N")
    modules = ("core_attn", "mlp", "layernorm")
    parser.add_argument("--recompute-modules", nargs="+", choices=modules, default=training.recompute_modules)


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parallel_config(options: argparse.Namespace) -> ParallelConfig:
    """The `parallel` group."""
    return ParallelConfig(**{field.name: getattr(options, field.name) for field in dataclasses.fields(ParallelConfig)})


def training_settings(options: argparse.Namespace) -> dict[str, object]:
    """Settings of the `training` group by name."""
    return {name: getattr(options, name) for name in _TRAINING}


def data_parallel_size(options: argparse.Namespace) -> int:
    """As asked for, or the smallest one whose ranks divide into the expert-parallel groups."""
    if options.data_parallel_size is not None:
        return options.data_parallel_size
    experts = options.expert_model_parallel_size
    return experts // gcd(experts, options.tensor_model_parallel_size * options.context_parallel_size)


def world_size(options: argparse.Namespace) -> int:
    """Processes that the layout needs."""
    replica = options.tensor_model_parallel_size * options.context_parallel_size * options.pipeline_model_parallel_size
    return replica * data_parallel_size(options)
