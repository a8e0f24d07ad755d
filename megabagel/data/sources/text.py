"""Text alone: `text`, all of it learnt, or `prompt` and `response`, of which the response is learnt."""

from megabagel.data.document import Entry
from megabagel.data.sources import fields
from megabagel.data.sources.context import Context
from megabagel.data.sources.format import Format


def entries(row: dict, context: Context) -> list[Entry]:
    if row.get("response") is None:
        return [Entry(text=fields.text(row, "text"), loss=True)]
    return [Entry(text=fields.text(row, "prompt")), Entry(text=fields.text(row, "response"), loss=True)]


FORMAT = Format(entries, optional=["text", "prompt", "response"])
