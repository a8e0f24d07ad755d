"""The official registry of data sets, `dataset_info.py`, read as a syntax tree and never run; the data YAML with it."""

import ast
import dataclasses
from pathlib import Path

import yaml

from megabagel.config.datasets import EDIT, T2I, VLM, DatasetPaths, GroupConfig
from migration.command import CommandError

FORMAT_OF_CLASS = {
    "T2IIterableDataset": T2I,
    "UnifiedEditIterableDataset": EDIT,
    "SftJSONLIterableDataset": VLM,
}
_TABLES = ("DATASET_REGISTRY", "DATASET_INFO")


def read_registry(path: Path) -> tuple[dict[str, str], dict[str, dict]]:
    """Group -> class name, and group -> data set -> paths. Raises CommandError naming a line that is no plain value."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(
            f"{path} cannot be read ({error.strerror}); give the repository's dataset_info.py."
        ) from None
    except (SyntaxError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} is no Python file: {error}.") from None
    names: dict[str, object] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            target = statement.targets[0].id
            try:
                names[target] = _value(statement.value, names)
            except ValueError as error:
                if target in _TABLES:
                    raise CommandError(f"{path}, {error}; write the value out.") from None
    missing = [table for table in _TABLES if not isinstance(names.get(table), dict)]
    if missing:
        raise CommandError(f"{path} does not assign {missing[0]}; give the repository's data/dataset_info.py.")
    return names["DATASET_REGISTRY"], names["DATASET_INFO"]


def _value(node: ast.expr, names: dict[str, object]) -> object:
    """Constants, containers of them, names assigned above, sums of texts, os.path.join; classes by name."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return names.get(node.id, node.id)
        case ast.Attribute():
            return node.attr
        case ast.Dict() if None not in node.keys:
            return {_value(k, names): _value(v, names) for k, v in zip(node.keys, node.values, strict=True)}
        case ast.List() | ast.Tuple():
            return [_value(entry, names) for entry in node.elts]
        case ast.BinOp(op=ast.Add()):
            parts = [_value(side, names) for side in (node.left, node.right)]
            if all(isinstance(part, str) for part in parts):
                return "".join(parts)
        case ast.JoinedStr():
            parts = [_value(v.value if isinstance(v, ast.FormattedValue) else v, names) for v in node.values]
            if all(isinstance(part, str) for part in parts):
                return "".join(parts)
        case ast.Call(func=ast.Attribute(attr="join"), keywords=[]):
            parts = [_value(argument, names) for argument in node.args]
            if parts and all(isinstance(part, str) for part in parts):
                return str(Path(*parts))
    raise ValueError(f"line {node.lineno}: `{ast.unparse(node)[:60]}` is not a plain value")


def translate_data(config_file: Path, registry: Path) -> tuple[dict[str, dict], list[tuple[str, str]]]:
    """The official data YAML with the paths of the registry inside, and what was left out, as (name, reason)."""
    try:
        content = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"{config_file} cannot be read ({error.strerror}); give --dataset-config.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError(f"{config_file} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise CommandError(f"{config_file} must map groups to their settings; it holds none.")
    classes, info = read_registry(registry)
    groups, lost = {}, []
    for name, group in content.items():
        kind = classes.get(name)
        if kind not in FORMAT_OF_CLASS:
            why = f"is read by {kind}" if kind else "is in no DATASET_REGISTRY"
            known = ", ".join(FORMAT_OF_CLASS)
            lost.append((name, f"the group {why}; formats are known of {known}: see docs/data.md for others"))
            continue
        groups[name] = _group(name, group, FORMAT_OF_CLASS[kind], info.get(name, {}), lost)
    return groups, lost


def _group(name: str, group: dict, kind: str, info: dict[str, dict], lost: list[tuple[str, str]]) -> dict:
    """One group in our terms; keys that mean nothing here are added to `lost`."""
    known = {field.name for field in dataclasses.fields(GroupConfig)} - {"datasets", "format"}
    out: dict[str, object] = {} if name == kind else {"format": kind}
    datasets = {}
    for dataset in group.get("dataset_names", []):
        if dataset not in info:
            raise CommandError(
                f"data set `{dataset}` of group `{name}` is not in DATASET_INFO[`{name}`]; add it there."
            )
        paths = {field.name for field in dataclasses.fields(DatasetPaths)}
        datasets[dataset] = {key: value for key, value in info[dataset].items() if key in paths}
        lost += [(f"{name}.{dataset}.{key}", "is read by nothing here") for key in info[dataset] if key not in paths]
    out["datasets"] = datasets
    for key, value in group.items():
        if key in known:
            out[key] = value
        else:
            lost.append((f"{name}.{key}", "is read by nothing here"))
    return out
