"""Conversations: `messages` (or `conversations`) [{role, type: text | image, content | image_path}].

What the assistant says is learnt, what it shows is generated; `loss` of an item says otherwise.
"""

from dataclasses import replace

from megabagel.data.document import Entry
from megabagel.data.sources import fields
from megabagel.data.sources.context import Context
from megabagel.data.sources.format import Format
from megabagel.data.sources.items import typed_items

_ROLES = ("user", "assistant", "system")


def entries(row: dict, context: Context) -> list[Entry]:
    key = "conversations" if row.get("messages") is None and row.get("conversations") is not None else "messages"
    found = []
    for where, item, entry in typed_items(row, key, context):
        role = fields.choice(item, "role", _ROLES, where)
        found.append(fields.overridden(replace(entry, loss=role == "assistant"), item, where))
    return fields.learnt(found)


FORMAT = Format(entries, optional=None)
