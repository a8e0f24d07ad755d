"""Rules about what a configuration names on disk: initial weights, tokenizer, autoencoder and the data files.

Only names, JSON files and safetensors headers are read. Damaged rows of data are the reader's matter, not a fault here.
"""

import glob
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from megabagel.config.datasets import (
    EDIT,
    T2I,
    UND_ONLY,
    DatasetPaths,
    GroupConfig,
    ImageTransformArgs,
    is_url,
    load_dataset_groups,
)
from megabagel.config.errors import ConfigError
from megabagel.config.folder import LATENT_TABLE, VIT_TABLE, is_checkpoint, read_autoencoder_config, tensor_shapes
from megabagel.config.paths import autoencoder_path, tokenizer_path
from megabagel.config.schema import Config

_EMBEDDING = "language_model.model.embed_tokens.weight"
_FRAMES = {
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
}  # appended to a tokenizer that lacks them


def file_faults(config: Config) -> Iterator[str]:
    """Faults in order of importance. May raise ConfigError itself where a file cannot be parsed at all."""
    yield from _written_to("run_dir", Path(config.checkpoint.run_dir))
    if config.checkpoint.local_dir:
        yield from _written_to("local_dir", Path(config.checkpoint.local_dir))
    yield from _initial_weights(config)
    yield from _autoencoder(config)
    yield from _tokenizer(config)
    yield from _data_file(config)
    if config.validation.interval > 0:
        yield from _groups(config, config.validation.dataset_config_file)


def _written_to(setting: str, folder: Path) -> Iterator[str]:
    """A folder that cannot be written would else be noticed by the first save, hours later."""
    above = folder.absolute()
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        yield f"checkpoint.{setting} {folder} cannot be made: {above} is not a folder; choose another one."
    if not os.access(above, os.W_OK | os.X_OK):
        yield f"checkpoint.{setting} {folder} cannot be written: {above} is read-only for this user; choose another."


def _initial_weights(config: Config) -> Iterator[str]:
    wanted = config.checkpoint
    if wanted.init_from and (wanted.init_llm or wanted.init_vit):
        other = "init_llm" if wanted.init_llm else "init_vit"
        yield (
            f"checkpoint.init_from and checkpoint.{other} are both set; a BAGEL folder already holds the language "
            f"model and the ViT, so keep one of them."
        )
    if wanted.init_vit and not config.model.visual_und:
        yield "checkpoint.init_vit is set, but model.visual_und is false; set it to true or leave init_vit out."
    for name in ("init_llm", "init_vit"):
        folder = getattr(wanted, name)
        if folder and not Path(folder).is_dir():
            yield f"checkpoint.{name}: there is no folder {folder}; give a folder with safetensors files."
        if folder and not list(Path(folder).glob("*.safetensors")):
            yield f"checkpoint.{name}: {folder} holds no *.safetensors file; give a folder with the weights."
    if wanted.init_from:
        yield from _bagel_folder(config, Path(wanted.init_from))


def _bagel_folder(config: Config, folder: Path) -> Iterator[str]:
    model = config.model
    if not folder.is_dir():
        yield (
            f"checkpoint.init_from: there is no folder {folder}; give a BAGEL folder, as released on the Hub, or a run "
            "folder."
        )
    if is_checkpoint(folder):
        return  # its tensors are compared with the model when they are read
    stems = sorted(("ema", "model"), reverse=not config.checkpoint.load_ema)
    shapes = next((found for stem in stems if (found := _shapes(folder, f"{stem}.safetensors"))), None)
    if shapes is None:
        yield f"checkpoint.init_from: {folder} holds neither ema.safetensors nor model.safetensors."
    if (embedding := shapes.get(_EMBEDDING)) and embedding != [model.vocab_size, model.hidden_size]:
        yield (
            f"checkpoint.init_from: {folder} was made for vocab_size x hidden_size {embedding[0]} x {embedding[1]}, "
            f"but the model has {model.vocab_size} x {model.hidden_size}; set model.folder to the same folder."
        )
    for table, name, side, used in (
        (LATENT_TABLE, "max_latent_size", model.max_latent_size, model.visual_gen),
        (VIT_TABLE, "vit.max_num_patch_per_side", model.vit.max_num_patch_per_side, model.visual_und),
    ):
        if used and table in shapes and shapes[table][0] != side**2:
            yield (
                f"model.{name} is {side}, but the weights in {folder} were trained with {math.isqrt(shapes[table][0])} "
                f"({table} has {shapes[table][0]} rows); set model.{name} to that."
            )


def _shapes(folder: Path, file: str) -> dict[str, list[int]] | None:
    """Shapes of all tensors of `file`, which an index may split over several files; None where there is neither."""
    index = folder / f"{file}.index.json"
    if (folder / file).is_file():
        return tensor_shapes(folder / file)
    if not index.is_file():
        return None
    try:
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{index} is not a readable weight index; fetch it again.") from None
    shapes: dict[str, list[int]] = {}
    for part in parts:
        shapes |= tensor_shapes(folder / part)
    return shapes


def _autoencoder(config: Config) -> Iterator[str]:
    if not config.model.visual_gen:
        return
    path = autoencoder_path(config)
    setting = "init_vae" if config.checkpoint.init_vae else "init_from"
    if path is None:
        yield (
            "no autoencoder is named, but model.visual_gen is true; set checkpoint.init_vae to a folder with "
            "ae.safetensors, or visual_gen to false."
        )
    file = Path(path) / "ae.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        yield f"checkpoint.{setting}: there is no autoencoder at {path}; give ae.safetensors or its folder."
    tensor_shapes(file)  # raises when the file was cut short
    stated = read_autoencoder_config(file.parent)
    if stated is None:
        return
    ours = config.model.vae
    names = [n for n in vars(stated) if n != "resolution" and getattr(stated, n) != getattr(ours, n)]
    if names:
        yield (
            f"model.vae.{names[0]} is {getattr(ours, names[0])}, but {file.parent / 'ae_params.json'} says "
            f"{getattr(stated, names[0])}; set model.vae to what that file says."
        )


def _tokenizer(config: Config) -> Iterator[str]:
    path = tokenizer_path(config)
    if path is None:
        yield "no tokenizer is named; set data.tokenizer to a folder with tokenizer.json."
    setting = "data.tokenizer" if config.data.tokenizer else "tokenizer of the initial weights"
    folder = Path(path)
    if not folder.is_dir():
        yield f"{setting}: there is no folder {folder}; give a folder with tokenizer.json."
    file = folder / "tokenizer.json"
    if not file.is_file():
        if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
            yield (
                f"{setting}: {folder} holds neither tokenizer.json nor vocab.json with merges.txt; set data.tokenizer."
            )
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        added = {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
        ids = [*content["model"]["vocab"].values(), *added.values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{setting}: {file} is not a readable tokenizer file; fetch it again.") from None
    needed = max(ids) + 1 + len(_FRAMES - added.keys() - content["model"]["vocab"].keys())
    if needed > config.model.vocab_size:
        yield (
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer in {folder} has {needed} tokens; set it "
            f"to {math.ceil(needed / 128) * 128} or more."
        )


def _data_file(config: Config) -> Iterator[str]:
    path = config.data.dataset_config_file
    if path is None:
        yield "data.dataset_config_file is not set; give a YAML file with the groups of data to train on."
    yield from _groups(config, path)


def _groups(config: Config, path: str) -> Iterator[str]:
    """Of the data file at `path`."""
    groups = load_dataset_groups(path)
    if not any(group.weight > 0 for group in groups.values()):
        yield f"data file {path}: no group has a weight above 0, so nothing would be drawn; raise one."
    for name, group in groups.items():
        where = f"data file {path}, group `{name}`"
        yield from _group(config, group, where)
        for args_name, args, kind in _transforms(group):
            yield from _pictures(config, args, kind, f"{where}, {args_name}")


def _transforms(group: GroupConfig) -> Iterator[tuple[str, ImageTransformArgs, str]]:
    """Settings for pictures of a group and what makes tokens of them: `vae` or `vit`."""
    if group.vae_args is not None:
        yield "image_transform_args", group.vae_args, "vae"
    if group.vit_args is not None:
        at = "vit_image_transform_args" if group.vit_image_transform_args else "image_transform_args"
        yield at, group.vit_args, "vit"


def _group(config: Config, group: GroupConfig, where: str) -> Iterator[str]:
    if group.weight < 0:
        yield f"{where}: weight is {group.weight}, but must not be negative."
    if group.repeats is not None and group.repeats < 1:
        yield f"{where}: repeats is {group.repeats}, but must be at least 1; leave it out for an endless group."
    if group.format in (T2I, EDIT, "text_to_image", "multi_step_editing") and not config.model.visual_gen:
        yield f"{where} makes pictures, but model.visual_gen is false; set it to true or remove the group."
    if group.format in (EDIT, *UND_ONLY) and group.format != "text" and not config.model.visual_und:
        yield (
            f"{where} reads pictures through the ViT, but model.visual_und is false; set it to true or "
            f"remove the group."
        )
    if frames := group.frame_sampler_args:
        if not 0 < frames.min_num_frames <= frames.max_num_frames:
            yield (
                f"{where}: frame_sampler_args has min_num_frames {frames.min_num_frames} and max_num_frames "
                f"{frames.max_num_frames}; they must be positive and in that order."
            )
    for dataset, used in zip(group.dataset_names, group.num_used_data or [], strict=False):
        if used < 1:
            yield f"{where}, data set `{dataset}`: num_used_data is {used}, but must be at least 1."
    for dataset, paths in group.datasets.items():
        yield from _paths(group.format, paths, f"{where}, data set `{dataset}`")


def _paths(format: str, paths: DatasetPaths, at: str) -> Iterator[str]:
    """Local files and folders that are not there; what lies behind a URL is found out when the run starts."""
    jsonl, folder, path, info = paths.jsonl_path, paths.data_dir, paths.path, paths.parquet_info_path
    if jsonl is not None and not is_url(jsonl) and not Path(jsonl).is_file():
        yield f"{at}: jsonl_path {jsonl} is not a file (relative paths count from the data file)."
    if folder is not None and not is_url(folder) and not Path(folder).is_dir():
        yield f"{at}: data_dir {folder} is not a folder (relative paths count from the data file)."
    if path not in (None, jsonl, folder) and not is_url(path) and not (Path(path).exists() or glob.glob(path)):
        yield f"{at}: path {path} is not there (relative paths count from the data file)."
    if format in (T2I, EDIT) and path == folder and not is_url(path) and not list(Path(folder).glob("*.parquet")):
        yield f"{at}: data_dir {folder} holds no *.parquet file."
    if info is not None and not is_url(info) and not Path(info).is_file():
        yield f"{at}: parquet_info_path {info} is not a file; leave the key out to do without."


def _pictures(config: Config, args: ImageTransformArgs, kind: str, where: str) -> Iterator[str]:
    """Picture sizes against the stride of the tokens, the position tables and the token budget."""
    model = config.model
    for name in ("image_stride", "max_image_size", "min_image_size", "max_pixels"):
        if getattr(args, name) < 1:
            yield f"{where}: {name} is {getattr(args, name)}, but must be at least 1."
    if args.min_image_size > args.max_image_size:
        yield f"{where}: min_image_size {args.min_image_size} is more than max_image_size {args.max_image_size}."
    if kind == "vae":
        stride, side, table = model.vae.downsample * model.latent_patch_size, model.max_latent_size, "max_latent_size"
        made_of = f"model.vae.downsample {model.vae.downsample} x model.latent_patch_size {model.latent_patch_size}"
    else:
        stride, side = model.vit.patch_size, model.vit.max_num_patch_per_side
        table, made_of = "vit.max_num_patch_per_side", f"model.vit.patch_size {model.vit.patch_size}"
    if args.image_stride % stride:
        yield (
            f"{where}: image_stride {args.image_stride} is not a multiple of the {stride} pixels that one token covers "
            f"({made_of}); set it to {stride}."
        )
    tokens_per_side = round(args.max_image_size / args.image_stride) * args.image_stride // stride
    if tokens_per_side > side and not model.interpolate_pos:
        yield (
            f"{where}: max_image_size {args.max_image_size} makes {tokens_per_side} tokens per side, more than "
            f"model.{table} {side}; set max_image_size to at most {side * stride}."
        )
    largest = min(tokens_per_side**2, args.max_pixels // stride**2) + 2  # with the start and end token
    if largest > config.data.max_num_tokens_per_sample:
        yield (
            f"{where}: the largest picture takes {largest} tokens, more than data.max_num_tokens_per_sample "
            f"{config.data.max_num_tokens_per_sample}; raise that or lower max_image_size."
        )
