"""Checks that formats share: a field of a row is there and has its type, or the row is a fault that says so.

Not here: what a field means.
"""

from collections.abc import Iterator
from dataclasses import replace

from megabagel.data.document import Entry
from megabagel.data.faults import DataFault


def text(row: dict, key: str, where: str = "") -> str:
    """The text at `key`. Raises DataFault unless it is one."""
    return _typed(row, key, str, "a text", where)


def objects(row: dict, key: str) -> Iterator[tuple[str, dict]]:
    """Place (for messages) and content of each object of the list at `key`. Raises DataFault unless there is one."""
    values = _typed(row, key, list, "a list of objects", "")
    if not values:
        raise DataFault("bad_row", f"{key} is empty")
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise DataFault("bad_row", f"{key} {i} must be an object, found {type(value).__name__}")
        yield f"{key} {i}", value


def switch(row: dict, key: str, where: str = "", default: bool | None = None) -> bool | None:
    """True or false at `key`; `default` where it is missing or null. Raises DataFault for anything else."""
    value = row.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise DataFault("bad_row", f"{_at(key, where)} must be true or false, found {type(value).__name__}")
    return value


def choice(row: dict, key: str, allowed: tuple[str, ...], where: str = "") -> str:
    """The value at `key`, one of `allowed`. Raises DataFault for anything else."""
    value = row.get(key)
    if value not in allowed:
        found = "nothing" if value is None else ascii(value)[:40]
        raise DataFault("bad_row", f"{_at(key, where)} must be {' or '.join(allowed)}, found {found}")
    return value


def learnt(entries: list[Entry]) -> list[Entry]:
    """The same entries. Raises DataFault when none of them carries a loss: the row would teach nothing."""
    if not any(entry.loss for entry in entries):
        raise DataFault("bad_row", "nothing in it carries a loss; mark what is to be learnt")
    return entries


def overridden(entry: Entry, item: dict, where: str) -> Entry:
    """The entry with the `loss`, `enable_cfg`, `vae` and `vit` that `item` states."""
    given = {name: switch(item, name, where) for name in ("loss", "enable_cfg", "vae", "vit")}
    return replace(entry, **{name: value for name, value in given.items() if value is not None})


def _typed(row: dict, key: str, kind: type, described: str, where: str):
    value = row.get(key)
    if not isinstance(value, kind):
        found = "nothing" if value is None else type(value).__name__
        raise DataFault("bad_row", f"{_at(key, where)} must be {described}, found {found}")
    return value


def _at(key: str, where: str) -> str:
    return f"{where}: {key}" if where else f"key {key}"
