"""Builds small dataclasses from parsed YAML, with one sentence for a wrong key, a missing key or a wrong type.

Only for the types that the data file uses (bool, int, float, str, list, dict, nested dataclass, optional). The run's
own configuration goes through jsonargparse (`load.py`).
"""

import dataclasses
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from megabagel.config.errors import ConfigError, unknown_key

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def build(cls: type, value: Any, where: str) -> Any:
    """An instance of dataclass `cls` from mapping `value`; `where` (file and section) opens every message."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a mapping of keys to values, found {_shown(value)}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            raise unknown_key(where, str(key), fields)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ConfigError(f"{where}: key `{name}` is missing; add it.")
    hints = get_type_hints(cls)
    return cls(**{key: _convert(hints[key], entry, f"{where}, key `{key}`") for key, entry in value.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as type `hint`, or a ConfigError that names `where`."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        (hint,) = [option for option in get_args(hint) if option is not type(None)]
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, found {_shown(value)}.")
        return [_convert(get_args(hint)[0], entry, f"{where}, entry {i}") for i, entry in enumerate(value)]
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a mapping, found {_shown(value)}.")
        return {
            str(name): _convert(get_args(hint)[1], entry, f"{where}, entry `{name}`") for name, entry in value.items()
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {_NAMES[hint]}, found {_shown(value)}.")
    return value


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"
