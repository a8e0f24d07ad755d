"""Pretraining pairs: `text`, `image` and `metadata` {task: text_to_image | image_to_text}.

Without a task, each visit draws one of the two directions.
"""

from megabagel.data.document import Entry
from megabagel.data.faults import DataFault
from megabagel.data.sources import fields
from megabagel.data.sources.captions import picture
from megabagel.data.sources.context import Context
from megabagel.data.sources.format import Format

_TASKS = ("text_to_image", "image_to_text")


def entries(row: dict, context: Context) -> list[Entry]:
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise DataFault("bad_row", f"key metadata must be an object, found {type(metadata).__name__}")
    if metadata.get("task") is None:
        task = _TASKS[int(context.generator("pair_direction").integers(0, 2))]
    else:
        task = fields.choice(metadata, "task", _TASKS, "metadata")
    text = fields.text(row, "text")
    if task == "text_to_image":
        return [Entry(text=text), picture(row, context, loss=True)]
    return [picture(row, context, loss=False), Entry(text=text, loss=True)]


FORMAT = Format(entries, required=["text"], optional=["image", "image_path", "metadata"])
