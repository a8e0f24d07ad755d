"""What is evaluated and by which scores: the typed content of the file that `megabagel.evaluate` is given.

Reading and checking only; nothing is loaded.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_args

import yaml

from megabagel.config.errors import ConfigError
from megabagel.config.fields import build
from megabagel.inference.guidance import Renorm

FORMATS = ("rows", "pictures", "geneval", "dpg", "mme", "pope")


@dataclass
class Models:
    """Models of others that some scores need: files and folders that you have fetched."""

    inception: str | None = None  # TorchScript file for fid and kid: inception-2015-12-05.pt of NVIDIA's StyleGAN
    vgg: str | None = None  # TorchScript file for lpips: vgg16.pt of NVIDIA's StyleGAN
    clip: str | None = None  # transformers folder of a CLIP model for clip_score and clip_retrieval
    bert: str | None = None  # transformers folder of an encoder for bertscore
    wordnet: str | None = None  # WordNet 3 folder for meteor: NLTK's corpora/wordnet or Debian's /usr/share/wordnet


@dataclass
class Task:
    """One set of questions or prompts and its scores. Relative paths count from the settings file."""

    file: str  # of the format: a file, or a folder for pictures, dpg and mme
    format: str = "rows"  # one of FORMATS
    scores: list[str] = field(default_factory=list)  # names in scores.py; none: only answers and pictures are collected
    images_dir: str | None = None  # pope: where the pictures are
    reference_dir: str | None = None  # fid and kid: folder of real pictures; null: the targets of the task
    limit: int | None = None  # only the first so many entries
    samples_per_prompt: int = 1  # pictures of each prompt, with seeds of their own
    batch_size: int = 8  # requests worked on together; scores may depend on it in the last digits
    seed: int = 0  # of the first request; the next ones count on
    template: str = "{}"  # what a question is put into, for example "{} Answer with one word."
    max_tokens: int = 64  # of an answer
    height: int | None = None  # of pictures whose entries say nothing; null: as large as the model makes them
    width: int | None = None
    num_timesteps: int = 50  # times from noise to picture; one step less
    timestep_shift: float = 3.0  # above 1: smaller steps while there is much noise
    cfg_text_scale: float = 4.0  # guidance by the prompt; 1: off
    cfg_img_scale: float = 1.5  # guidance by the pictures; 1: off
    cfg_interval: list[float] = field(default_factory=lambda: [0.4, 1.0])  # times with guidance
    cfg_renorm: str = "global"  # how the length of guided velocities is bound: global, channel or text_channel
    cfg_renorm_min: float = 0.0  # least factor of that
    caption_question: str = "Describe this picture."  # consistency and retrieval: what the model is asked about its own
    distractors: int = 9  # retrieval: other prompts of the task that compete with the right one
    bert_layer: int | None = None  # bertscore: hidden layer, from 1; null: the last one


@dataclass
class Settings:
    """The whole file."""

    tasks: dict[str, Task]
    models: Models = field(default_factory=Models)


def read_settings(path: str | Path, overrides: dict[str, str | None] | None = None) -> Settings:
    """The settings in the YAML file at `path`, paths absolute; `overrides`: fields of `Models` that win if not None.

    Raises ConfigError.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read ({error.strerror}); give a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is no YAML file ({error}).") from None
    settings = build(Settings, content, f"--config {path}")
    if not settings.tasks:
        raise ConfigError(f"--config {path}: `tasks` is empty; describe at least one.")
    for name, task in settings.tasks.items():
        _complete(task, path, f"--config {path}, task `{name}`")
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
            raise ConfigError(
                f"--config {path}: a task's name is a folder's name too; use letters, digits, - and _ in `{name}`."
            )
    for one in fields(Models):
        if (given := (overrides or {}).get(one.name)) is not None:
            setattr(settings.models, one.name, given)
        elif (value := getattr(settings.models, one.name)) is not None:
            setattr(settings.models, one.name, str(_absolute(value, path)))
        if (value := getattr(settings.models, one.name)) is not None and not Path(value).exists():
            raise ConfigError(f"models.{one.name}: {value} is not there; fix it in {path} or give --{one.name} PATH.")
    return settings


def _complete(task: Task, path: Path, where: str) -> None:
    """Absolute paths; values that no task may have are refused."""
    for name, allowed in (("format", FORMATS), ("cfg_renorm", get_args(Renorm))):
        if (value := getattr(task, name)) not in allowed:
            raise ConfigError(f"{where}: `{name}` is {value}, but must be one of {', '.join(allowed)}.")
    for name in ("file", "images_dir", "reference_dir"):
        if (value := getattr(task, name)) is not None:
            value = _absolute(value, path)
            if not value.exists():
                raise ConfigError(f"{where}: `{name}` {value} is not there (relative paths count from {path.parent}).")
            setattr(task, name, str(value))
    for name in ("limit", "samples_per_prompt", "batch_size", "max_tokens", "distractors"):
        if (value := getattr(task, name)) is not None and value < 1:
            raise ConfigError(f"{where}: `{name}` is {value}, but must be at least 1.")
    if task.format == "pope" and task.images_dir is None:
        raise ConfigError(f"{where}: key `images_dir` is missing; POPE's files name pictures of COCO's val2014 folder.")
    if "{}" not in task.template:
        raise ConfigError(f"{where}: `template` must hold {{}}, where the question goes.")
    if len(task.cfg_interval) != 2:
        raise ConfigError(f"{where}: `cfg_interval` must be two times, low and high.")


def _absolute(value: str, path: Path) -> Path:
    return (path.parent / Path(value).expanduser()).absolute()
