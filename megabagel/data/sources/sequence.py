"""Documents item by item: `sequence` states every loss itself, `interleaved` learns all but its first pictures.

Items are {type: text | image, content, loss, enable_cfg, vae, vit}.
"""

from dataclasses import replace

from megabagel.data.document import Entry
from megabagel.data.sources import fields
from megabagel.data.sources.context import Context
from megabagel.data.sources.format import Format
from megabagel.data.sources.items import typed_items


def sequence_entries(row: dict, context: Context) -> list[Entry]:
    """`loss` is false where it is not stated."""
    found = [fields.overridden(entry, item, where) for where, item, entry in typed_items(row, "sequence", context)]
    return fields.learnt(found)


def interleaved_entries(row: dict, context: Context) -> list[Entry]:
    """Texts are learnt, pictures generated; those before the first text have nothing to follow from and are shown."""
    found: list[Entry] = []
    begun = False
    for where, item, entry in typed_items(row, "content", context):
        begun = begun or entry.text is not None
        found.append(fields.overridden(replace(entry, loss=begun), item, where))
    return fields.learnt(found)


SEQUENCE = Format(sequence_entries, required=["sequence"])
INTERLEAVED = Format(interleaved_entries, required=["content"])
