"""Official text-to-image rows: `image` (encoded bytes) and `captions` (JSON string, name -> caption).

A caption, drawn anew at each visit, then its picture with the flow loss.
"""

import json

from megabagel.data.document import Entry
from megabagel.data.faults import DataFault
from megabagel.data.sources.context import Context
from megabagel.data.sources.format import Format


def entries(row: dict, context: Context) -> list[Entry]:
    caption = _draw_caption(row.get("captions"), context)
    return [Entry(text=caption), Entry(image=context.image(row.get("image") or b""), loss=True)]


def _draw_caption(captions: object, context: Context) -> str:
    try:
        choices = json.loads(captions or "") if not isinstance(captions, dict) else captions
    except (ValueError, TypeError, RecursionError) as error:
        raise DataFault("broken_json", f"column captions is not valid JSON ({error})") from None
    if not isinstance(choices, dict) or not all(isinstance(value, str) for value in choices.values()):
        raise DataFault("broken_json", "column captions must be a JSON object of strings, name -> caption")
    if not choices:
        return " "
    return list(choices.values())[int(context.generator("caption").integers(0, len(choices)))]


FORMAT = Format(entries, required=["image", "captions"])
