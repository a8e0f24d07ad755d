"""The command line of a run: `--config FILE_OR_PRESET --group.key value ...` -> a typed `Config`.

Later arguments win over earlier ones, and anything given wins over the defaults of `schema.py`. What combinations are
legal is decided in `checks.py`.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from megabagel.config.errors import ConfigError, unknown_key
from megabagel.config.folder import SWITCHES, read_model_config
from megabagel.config.help import dotted_fields, meanings, nested_dataclasses, switches
from megabagel.config.schema import Config, ModelConfig

PRESETS = Path(__file__).parent / "presets"
_EXAMPLE = """\
Presets: {presets}. Several --config are merged in order; overrides win.

Example:
  python -m megabagel.train --config demo --training.train_steps 100 --optimizer.lr 1e-3
  torchrun --standalone --nproc_per_node 2 -m megabagel.train --config run.yaml --parallel.tensor_model_parallel_size 2
"""
_WORDING = {  # jsonargparse's words -> ours
    "Parser key": "setting",
    "typing.Literal": "one of ",
    "<class '": "",
    "'>": "",
    "Expected a ": "expected ",
    ". Got value:": ", found",
}


def load_config(argv: list[str] | None = None) -> Config:
    """Parse `argv` (default: the process's arguments); `--help` prints every setting and exits.

    Where `model.folder` is set, the shape of the model is read from that BAGEL folder.

    Raises:
        ConfigError: a file that cannot be read or parsed, an unknown key, a value of the wrong type.
    """
    argv = _complete(_resolve(list(sys.argv[1:] if argv is None else argv)))
    _check_flags(argv)
    config = _parse(_parser(), argv)
    folder = config.model.folder
    if folder is None:
        return config
    # the folder's switches are defaults, which what was given overrides; its shape is a fact, which nothing does
    given = _parse(_parser(read_model_config(folder, ModelConfig())), argv).model
    switches = {name: getattr(given, name) for name in SWITCHES}
    config.model = dataclasses.replace(read_model_config(folder, given), **switches)
    return config


def _parse(parser: ArgumentParser, argv: list[str]) -> Config:
    try:
        groups = parser.instantiate(parser.parse_args(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(_sentence(str(error))) from None
    return Config(**{f.name: groups[f.name] for f in dataclasses.fields(Config)})


def to_yaml(config: Config) -> str:
    """All settings as YAML that `--config` reads back to an equal Config."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def saved_config(text: str) -> Config:
    """The Config of a YAML text that `to_yaml` wrote, today or in an earlier version, without looking at any folder.

    Keys that no longer exist are left out.
    """
    content = yaml.safe_load(text)
    content["model"]["folder"] = None  # its shape is in the text
    try:
        groups = _parser().instantiate(_parser().parse_object(_known(content, Config)))
    except argparse.ArgumentError as error:
        raise ConfigError(f"the configuration in the checkpoint cannot be read: {_sentence(str(error))}") from None
    return Config(**{f.name: groups[f.name] for f in dataclasses.fields(Config)})


def _known(content: dict[str, Any], cls: type) -> dict[str, Any]:
    nested, names = nested_dataclasses(cls), {f.name for f in dataclasses.fields(cls)}
    return {
        key: _known(value, nested[key]) if key in nested and isinstance(value, dict) else value
        for key, value in content.items()
        if key in names
    }


def preset_names() -> list[str]:
    """Names that `--config` takes besides files."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Types and defaults beside every setting, and the example's line breaks kept."""


def _parser(model: ModelConfig | None = None) -> ArgumentParser:
    """`model`: defaults of that group, if not the schema's."""
    parser = ArgumentParser(
        prog="python -m megabagel.train",
        usage="%(prog)s [--config FILE_OR_PRESET] [--group.key VALUE ...]",
        description="Train a BAGEL-family model. Settings come from --config and from dotted overrides.",
        epilog=_EXAMPLE.format(presets=", ".join(preset_names())),
        formatter_class=_HelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with settings, or the name of a preset")
    groups = [f.name for f in dataclasses.fields(Config)]
    for field in dataclasses.fields(Config):
        default = model if model is not None and field.name == "model" else field.default_factory()
        parser.add_argument(f"--{field.name}", type=field.type, default=default)
    texts = meanings(Config)
    settings = set(dotted_fields(Config))
    for action in parser._actions:  # argparse's own list: jsonargparse takes texts from docstrings only
        if action.dest in settings:
            action.help, action.metavar = texts.get(action.dest), None if action.choices else "VALUE"
        elif action.dest.split(".")[0] in groups:
            action.help = argparse.SUPPRESS  # a whole group on the command line: --config does that
    return parser


def _resolve(argv: list[str]) -> list[str]:
    """`argv` with presets replaced by their files, after checking that each file parses and has only known keys."""
    resolved = []
    takes_file = False
    for argument in argv:
        name, equals, value = argument.partition("=")
        if takes_file:
            argument = _config_file(argument)
        elif name == "--config" and equals:
            argument = f"--config={_config_file(value)}"
        takes_file = argument == "--config"
        resolved.append(argument)
    return resolved


def _complete(argv: list[str]) -> list[str]:
    """`argv` with `=true` behind every switch that is given without a value."""
    bare = {f"--{name}" for name in switches(Config)}
    following = [*argv[1:], "--"]
    return [
        f"{argument}=true" if argument in bare and after.startswith("--") else argument
        for argument, after in zip(argv, following, strict=False)
    ]


def _config_file(name: str) -> str:
    preset = PRESETS / f"{name}.yaml"
    path = preset if name in preset_names() else Path(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        presets = ", ".join(preset_names())
        raise ConfigError(
            f"config file {name} cannot be read ({error.strerror}); give a file or one of {presets}."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} must hold groups of settings ({_groups()}); it holds none.")
    _check_keys(content, Config, f"config file {path}", "")
    return str(path)


def _check_keys(content: dict[str, Any], cls: type, where: str, prefix: str) -> None:
    allowed = [f.name for f in dataclasses.fields(cls)]
    nested = nested_dataclasses(cls)
    for key, value in content.items():
        if key not in allowed:
            raise unknown_key(where, f"{prefix}{key}", allowed)
        if key in nested:
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: `{prefix}{key}` is a group and must hold settings, found {value!r}.")
            _check_keys(value, nested[key], where, f"{prefix}{key}.")


def _check_flags(argv: list[str]) -> None:
    """Every `--group.key` exists; the nearest one is named otherwise."""
    known = dotted_fields(Config)
    allowed = {*known, "config", "help", "print_config"}
    for argument in argv:
        name = argument[2:].partition("=")[0]
        if argument.startswith("--") and name not in allowed:
            group = name.rpartition(".")[0]
            beside = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == group]
            if beside:
                raise unknown_key("command line", name, beside)
            raise ConfigError(
                f"command line: unknown option `--{name}`; options are --config and --group.key ({_groups()})."
            )


def _sentence(message: str) -> str:
    """jsonargparse's message of several lines as one sentence."""
    message = " ".join(message.split())
    for theirs, ours in _WORDING.items():
        message = message.replace(theirs, ours)
    return message.rstrip(".") + "; see --help."


def _groups() -> str:
    return ", ".join(f.name for f in dataclasses.fields(Config))


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down, so that safe YAML can hold them."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
