"""What a format is: a function from a row to entries, and the columns it reads where rows lie in parquet.

Reading files and laying documents out are not a format's business.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from megabagel.data.document import Entry
from megabagel.data.sources.context import Context


@dataclass(frozen=True)
class Format:
    """`entries` raises DataFault when a row cannot be used."""

    entries: Callable[[dict, Context], list[Entry]]
    required: list[str] = field(default_factory=list)  # parquet columns without which a file has no rows
    optional: list[str] | None = field(default_factory=list)  # others that are read where present; null: all

    @property
    def columns(self) -> list[str] | None:
        """All parquet columns that are read; null: every one."""
        return None if self.optional is None else [*self.required, *self.optional]
