"""One file per data format: row number -> Sample. `open_source` picks the one that a group's name stands for."""

from typing import Protocol

from megabagel.config.datasets import EDIT, T2I, VLM, GroupConfig
from megabagel.data.faults import DataError, Fault
from megabagel.data.sample import Sample
from megabagel.data.sources.edit import EditSource
from megabagel.data.sources.t2i import T2ISource
from megabagel.data.sources.vlm import VLMSource
from megabagel.data.text import Tokenizer


class Source(Protocol):
    """Random access to the samples of a group."""

    blocks: list[int]  # rows that are cheap to read together
    window: int | None  # how many blocks are shuffled together; null: all
    faults: list[Fault]  # found while opening

    def origin(self, row: int) -> str: ...

    def sample(self, row: int, key: tuple[int, ...]) -> Sample: ...


_SOURCES = {T2I: T2ISource, EDIT: EditSource, VLM: VLMSource}


def open_source(name: str, group: GroupConfig, tokenizer: Tokenizer, seed: int) -> Source:
    """Open group `name`. Raises DataError when its files are missing or none of them can be read."""
    source = _SOURCES[name](name, group, tokenizer, seed)
    if not sum(source.blocks):
        reason = f"; the first fault: {source.faults[0]}" if source.faults else ""
        raise DataError(f"group {name} has no readable row{reason}. Fix the data or remove the group.")
    return source
