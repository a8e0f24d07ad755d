"""One picture with one text: `text_to_image` makes the picture, `image_to_text` learns the text.

The picture is `image_path` or `image`: a name, or bytes in parquet and WebDataset.
"""

from megabagel.data.document import Entry
from megabagel.data.faults import DataFault
from megabagel.data.sources import fields
from megabagel.data.sources.context import Context
from megabagel.data.sources.format import Format


def text_to_image(row: dict, context: Context) -> list[Entry]:
    prompt = _first(row, "text_prompt", "text", "caption")
    return [Entry(text=fields.text(row, prompt)), picture(row, context, loss=True)]


def image_to_text(row: dict, context: Context) -> list[Entry]:
    found = [picture(row, context, loss=False)]
    if row.get("prompt") is not None:
        found.append(Entry(text=fields.text(row, "prompt")))
    return [*found, Entry(text=fields.text(row, _first(row, "text", "caption")), loss=True)]


def picture(row: dict, context: Context, *, loss: bool) -> Entry:
    """The row's picture. Raises DataFault when it names none."""
    reference = row[_first(row, "image_path", "image")] if row.get("image_path") or row.get("image") else None
    if reference is None:
        raise DataFault("bad_row", "key image_path (or image) must name a picture, found nothing")
    return Entry(image=context.image(reference), loss=loss)


def _first(row: dict, *names: str) -> str:
    """The first of `names` that the row has, or the first of all."""
    return next((name for name in names if row.get(name) is not None), names[0])


TEXT_TO_IMAGE = Format(text_to_image, optional=["text_prompt", "text", "caption", "image_path", "image"])
IMAGE_TO_TEXT = Format(image_to_text, optional=["text", "caption", "prompt", "image_path", "image"])
