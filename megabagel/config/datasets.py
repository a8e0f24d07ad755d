"""The data file: groups of data sets, their formats, image sizes, weights and paths, under the official BAGEL keys.

`load_dataset_groups` reads and types it and resolves paths; the samples themselves are read by `megabagel.data`.
Whether paths exist and sizes fit the model is checked in `checks.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megabagel.config.errors import ConfigError
from megabagel.config.fields import build

T2I, EDIT, VLM = "t2i_pretrain", "unified_edit", "vlm_sft"
FORMATS = (
    T2I,
    EDIT,
    VLM,
    "conversations",
    "text_to_image",
    "image_to_text",
    "multi_step_editing",
    "sequence",
    "interleaved",
    "pretrain_pair",
    "sft_chat",
    "text",
    "video",
)
FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".tar")
UND_ONLY = (VLM, "image_to_text", "sft_chat", "text", "video")  # generate no picture: one size, that of the ViT


@dataclass
class ImageTransformArgs:
    """Target size of pictures, in pixels; the rule itself is in `megabagel.data.images`."""

    image_stride: int  # both sides are multiples of it
    max_image_size: int  # longest side
    min_image_size: int  # shortest side, unless the longest would pass max_image_size
    max_pixels: int = 14 * 14 * 9 * 1024  # of all pictures of a sample together, where the source has several


@dataclass
class FrameSamplerArgs:
    """How many frames are taken from a video."""

    max_num_frames: int
    min_num_frames: int = 8


@dataclass
class DatasetPaths:
    """Where one data set lies. Relative paths count from the data file's folder; absolute once loaded."""

    data_dir: str | None = None  # folder of the files, or what image names in `path` are relative to
    jsonl_path: str | None = None  # official name of `path` for conversations
    path: str | None = None  # .json, .jsonl, .parquet or .tar: a file, a folder, a pattern with *, or a URL of those
    parquet_info_path: str | None = None  # JSON {parquet path: {"num_row_groups": n}}; null: read from the files
    num_files: int | None = None  # informative, as in the official registry
    num_total_samples: int | None = None  # informative


@dataclass
class GroupConfig:
    """One group: data sets mixed into one stream of samples."""

    datasets: dict[str, DatasetPaths]
    # VAE pictures; ViT pictures where the format generates none; only the format text goes without
    image_transform_args: ImageTransformArgs | None = None
    dataset_names: list[str] = field(default_factory=list)  # entries of `datasets` that are used, in order; empty: all
    format: str = ""  # one of FORMATS; empty: the group's name
    vit_image_transform_args: ImageTransformArgs | None = None  # ViT pictures of formats that generate
    frame_sampler_args: FrameSamplerArgs | None = None  # videos
    is_mandatory: bool = False  # every pack starts with a sample of each mandatory group
    weight: float = 1.0  # relative frequency of draws among the groups
    num_used_data: list[int] | None = None  # per data set: parquet files, or rows of other files; null: all
    shuffle_lines: bool = False  # num_used_data takes rows at random, not the first ones
    shuffle_seed: int = 0
    repeats: int | None = None  # passes over the group, after which it is drawn no more; null: endless
    latents_dir: str | None = None  # latents and features stored by tools/encode_latents.py
    index_dir: str | None = None  # indexes written by tools/index_data.py --out; null: beside the files

    @property
    def vae_args(self) -> ImageTransformArgs | None:
        """Sizes of pictures for the autoencoder; None where the format generates none."""
        return None if self.format in UND_ONLY else self.image_transform_args

    @property
    def vit_args(self) -> ImageTransformArgs | None:
        """Sizes of pictures for the ViT."""
        return self.vit_image_transform_args or (self.image_transform_args if self.format in UND_ONLY else None)


def load_dataset_groups(path: str) -> dict[str, GroupConfig]:
    """Read the data file at `path`: group name -> group, in file order, with absolute paths.

    Raises:
        ConfigError: missing or unreadable file, unknown group or key, missing key, wrong type, or a data set that is
            named but not described.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"data file {path} cannot be read ({error.strerror}); fix data.dataset_config_file."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"data file {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"data file {path} must map names to groups of data sets; it holds none.")
    groups = {}
    for name, group in content.items():
        groups[str(name)] = _group(str(name), group, f"data file {path}, group `{name}`", Path(path).resolve().parent)
    return groups


def _group(name: str, value: Any, where: str, folder: Path) -> GroupConfig:
    """The typed group with its format, `dataset_names` filled and `datasets` the used ones, paths absolute."""
    stated = value.get("format") if isinstance(value, dict) else None
    if (stated or name) not in FORMATS:
        raise ConfigError(
            f"{where}: `{stated or name}` is not a format; set `format` to one of {', '.join(FORMATS)}, "
            "or name the group like one."
        )
    group = build(GroupConfig, value, where)
    group.format = stated or name
    group.dataset_names = group.dataset_names or list(group.datasets)
    if not group.dataset_names:
        raise ConfigError(f"{where}: `datasets` is empty; describe at least one data set or remove the group.")
    for dataset in group.dataset_names:
        if dataset not in group.datasets:
            described = ", ".join(group.datasets)
            raise ConfigError(
                f"{where}: `dataset_names` has `{dataset}`, which `datasets` does not describe ({described})."
            )
        _check_source(group.format, group.datasets[dataset], f"{where}, data set `{dataset}`")
    group.datasets = {dataset: _absolute(group.datasets[dataset], folder) for dataset in group.dataset_names}
    for key in ("latents_dir", "index_dir"):
        if (value := getattr(group, key)) is not None:
            setattr(group, key, _located(value, folder))
    given, wanted = len(group.num_used_data or []), len(group.dataset_names)
    if group.num_used_data is not None and given != wanted:
        raise ConfigError(f"{where}: `num_used_data` has {given} entries for {wanted} data sets; give one for each.")
    if group.format != "text" and group.image_transform_args is None:
        raise ConfigError(f"{where}: key `image_transform_args` is missing; add it.")
    if group.format not in (*UND_ONLY, T2I, "text_to_image") and group.vit_image_transform_args is None:
        raise ConfigError(
            f"{where}: key `vit_image_transform_args` is missing; source pictures also enter through the ViT."
        )
    return group


def _absolute(paths: DatasetPaths, folder: Path) -> DatasetPaths:
    """The same with absolute paths, `path` always set; image names count from the files' folder where nothing else is
    said."""
    for name in ("data_dir", "jsonl_path", "path", "parquet_info_path"):
        if (value := getattr(paths, name)) is not None:
            setattr(paths, name, _located(value, folder))
    paths.path = paths.path or paths.jsonl_path or paths.data_dir
    if paths.data_dir is None:
        fixed = paths.path.partition("*")[0]  # of a pattern, the folders above it
        is_file = fixed != paths.path or Path(paths.path).suffix.lower() in FILE_SUFFIXES
        paths.data_dir = fixed.rpartition("/")[0] if is_file else paths.path
    return paths


def is_url(path: str) -> bool:
    """Whether fsspec, not the local file system, reads `path`."""
    return "://" in path


def _located(path: str, folder: Path) -> str:
    return path if is_url(path) else str(folder / Path(path).expanduser())


def _check_source(format: str, paths: DatasetPaths, where: str) -> None:
    if paths.path is not None and paths.jsonl_path is not None:
        raise ConfigError(f"{where}: `path` and `jsonl_path` are both set; they mean the same, keep one of them.")
    if paths.path is not None:
        return
    if format == VLM and paths.jsonl_path is None:
        raise ConfigError(f"{where}: key `jsonl_path` is missing; {VLM} reads conversations from a jsonl file.")
    if format in (T2I, EDIT) and paths.data_dir is None:
        raise ConfigError(f"{where}: key `data_dir` is missing; {format} reads the parquet files of a folder.")
    if format not in (T2I, EDIT, VLM):
        raise ConfigError(f"{where}: key `path` is missing; name the file, folder or URL that is read.")
