"""The meaning of every setting for `--help`, taken from the comments in the source of the dataclasses.

So a setting is explained in one place, beside its default. Nothing here parses or checks values.
"""

import dataclasses
import inspect
import io
import re
import tokenize

_FIELD = re.compile(r"^\s+(\w+):[^#]*$")


def meanings(cls: type, prefix: str = "") -> dict[str, str]:
    """Dotted name -> trailing comment, for the commented fields of dataclass `cls` and of those nested in it."""
    found = {}
    source = inspect.getsource(cls)
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (match := _FIELD.match(lines[token.start[0] - 1][: token.start[1]])):
            found[prefix + match[1]] = token.string.lstrip("# ")
    for name, nested in nested_dataclasses(cls).items():
        found[prefix + name] = (nested.__doc__ or "").split("\n")[0]
        found |= meanings(nested, f"{prefix}{name}.")
    return found


def nested_dataclasses(cls: type) -> dict[str, type]:
    """Field name -> its type, for the fields of `cls` that are dataclasses themselves."""
    return {f.name: f.type for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.type)}


def dotted_fields(cls: type, prefix: str = "") -> list[str]:
    """All settings of `cls` by dotted name, groups not included: `model.vit.patch_size`."""
    nested = nested_dataclasses(cls)
    names = []
    for f in dataclasses.fields(cls):
        name = prefix + f.name
        names += dotted_fields(nested[f.name], f"{name}.") if f.name in nested else [name]
    return names


def switches(cls: type, prefix: str = "") -> set[str]:
    """The settings of `cls` that are true or false, by dotted name."""
    found = {prefix + f.name for f in dataclasses.fields(cls) if f.type is bool}
    return found.union(*(switches(nested, f"{prefix}{name}.") for name, nested in nested_dataclasses(cls).items()))
