"""Turns of a chat and their pictures as entries: what the official chats and the plain ones share.

Which speakers there are, and where a video goes, is decided by the formats.
"""

from megabagel.data.document import Entry
from megabagel.data.faults import DataFault
from megabagel.data.sources.context import Context

IMAGE = "<image>"

Turn = tuple[str, str, bool | None]  # human, gpt or system; text; loss if stated


def with_pictures(turns: list[Turn], pictures: list[Entry]) -> list[Entry]:
    """Turns as entries, each human one split at its marks, which take the pictures in order. Text beside a mark loses
    its outer blanks. Raises DataFault unless there are as many marks as pictures."""
    markers = sum(value.count(IMAGE) for who, value, _ in turns if who == "human")
    if markers != len(pictures):
        raise DataFault("bad_row", f"{markers} {IMAGE} in the human turns, but {len(pictures)} pictures")
    found: list[Entry] = []
    waiting = iter(pictures)
    for who, value, loss in turns:
        if who != "human":
            found.append(Entry(text=value, loss=who == "gpt" if loss is None else loss))
            continue
        parts = value.split(IMAGE)
        for i, part in enumerate(parts):
            text = part.strip() if len(parts) > 1 else part
            if text or len(parts) == 1:
                found.append(Entry(text=text, loss=bool(loss)))
            if i < len(parts) - 1:
                found.append(next(waiting))
    return found


def named_images(row: dict, context: Context) -> list[Entry]:
    """The pictures that `image` names: one or a list."""
    names = row.get("image") or []
    names = names if isinstance(names, list) else [names]
    return [Entry(image=context.image(name)) for name in names]
