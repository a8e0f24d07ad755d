"""Lists of typed items, each a text or a picture: the part that conversations, sequences and documents share.

Which items carry a loss is decided by each format.
"""

from collections.abc import Iterator

from megabagel.data.document import Entry
from megabagel.data.faults import DataFault
from megabagel.data.sources import fields
from megabagel.data.sources.context import Context

_CONTENT = {"text": ("content", "text"), "image": ("image_path", "content", "image")}


def typed_items(row: dict, key: str, context: Context) -> Iterator[tuple[str, dict, Entry]]:
    """Place (for messages), item and entry without a loss, for each {type: text | image, content | image_path}."""
    for where, item in fields.objects(row, key):
        kind = fields.choice(item, "type", tuple(_CONTENT), where)
        given = [name for name in _CONTENT[kind] if item.get(name) is not None]
        if not given:
            raise DataFault("bad_row", f"{where}: a {kind} needs {' or '.join(_CONTENT[kind])}")
        if kind == "text":
            yield where, item, Entry(text=fields.text(item, given[0], where))
        else:
            yield where, item, Entry(image=context.image(item[given[0]]))
