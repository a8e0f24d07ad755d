"""What one node says of itself before ranks meet: its code, its settings, the files it sees, its disk. Only facts and
sentences about this node; whether nodes agree is decided in `judge.py`.
"""

import hashlib
import os
import platform
import socket
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import megabagel
from megabagel.checkpoint import folder
from megabagel.config.checks import check_config
from megabagel.config.datasets import is_url, load_dataset_groups
from megabagel.config.errors import ConfigError
from megabagel.config.load import load_config, to_yaml
from megabagel.config.schema import Config

_FLOAT32 = 4  # bytes


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def code_version() -> str:
    """Of megabagel's files as they are on this node, and of what they run on."""
    root = Path(megabagel.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".so", ".yaml"):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return (
        f"megabagel {megabagel.__version__} ({digest.hexdigest()[:12]}), torch {version('torch')}, "
        f"megatron-core {version('megatron-core')}, Python {platform.python_version()}"
    )


def settings_version(config: Config) -> str:
    """Of all settings and of the data files that they name."""
    digest = hashlib.sha256(to_yaml(config).encode())
    for path in (config.data.dataset_config_file, config.validation.dataset_config_file):
        if path is not None:
            digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:12]


def facts(argv: list[str], world_size: int) -> dict:
    """`code`, `settings` (None where they are wrong) and `faults`: sentences about this node alone."""
    found: dict = {"code": code_version(), "settings": None, "faults": []}
    try:
        config = load_config(argv)
        check_config(config, world_size)
        found["settings"] = settings_version(config)
    except (ConfigError, OSError) as error:
        found["faults"].append(str(error))
        return found
    found["faults"].extend([*_unreadable(config), *_unwritable(config)])
    return found


def _unreadable(config: Config) -> Iterator[str]:
    for path in _named_files(config):
        try:
            with open(path, "rb") as file:
                file.read(1)
        except OSError as error:
            yield f"{path} cannot be read ({error.strerror})."


def _named_files(config: Config) -> Iterator[Path]:
    """Of each place that the settings name, one file of each kind: a place that is not mounted has none."""
    places = [getattr(config.checkpoint, name) for name in ("init_from", "init_llm", "init_vit", "init_vae")]
    for data in (config.data.dataset_config_file, config.validation.dataset_config_file):
        for group in load_dataset_groups(data).values() if data else ():
            for paths in group.datasets.values():
                places += [paths.jsonl_path, paths.data_dir, paths.path]
    for place in dict.fromkeys(str(place) for place in places if place and not is_url(str(place))):
        if Path(place).is_dir():
            yield from {file.suffix: file for file in Path(place).iterdir() if file.is_file()}.values()
        elif Path(place).exists():
            yield Path(place)


def _unwritable(config: Config) -> Iterator[str]:
    wanted = config.checkpoint
    for name in filter(None, (wanted.run_dir, wanted.local_dir)):
        try:
            Path(name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=name) as file:
                file.write(b"0")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            yield f"{name} cannot be written ({error.strerror})."
    if wanted.save_interval and (short := folder.shortage(wanted.run_dir, "a checkpoint", least_bytes(config))):
        yield f"{short}."


def least_bytes(config: Config) -> int:
    """What a checkpoint takes at least: the decoder's MLPs and embedding in float32, with what the optimizer keeps.

    Training measures it exactly once the model is built.
    """
    model = config.model
    if model.freeze_llm:
        return 0
    streams = 1 if model.layer_variant == "dense" or model.freeze_und else 2
    parameters = streams * model.num_layers * 3 * model.hidden_size * model.ffn_hidden_size
    copies = 3 + (config.optimizer.ema_decay is not None)  # itself, two moments, the average
    return (parameters + model.vocab_size * model.hidden_size) * copies * _FLOAT32


def leave_mark(run_dir: str | Path, mark: str) -> Path:
    """A file that every node must see: `run_dir` has to be one folder for all."""
    path = Path(run_dir) / f".preflight-{mark}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path
