"""Official chats: `conversations` [{from: human | gpt, value}] with optional `image` (name or list) or `video`.

`<image>` marks in what the human says take the pictures in order, `<video>` takes the frames. Answers are learnt.
"""

from megabagel.data.document import Entry
from megabagel.data.faults import DataFault
from megabagel.data.sources import fields
from megabagel.data.sources.context import Context
from megabagel.data.sources.format import Format
from megabagel.data.sources.frames import draw_frames
from megabagel.data.sources.turns import IMAGE, Turn, named_images, with_pictures

VIDEO = "<video>"


def entries(row: dict, context: Context) -> list[Entry]:
    turns = _turns(row)
    pictures = named_images(row, context)
    if row.get("video"):
        if pictures:
            raise DataFault("bad_row", "has both image and video; give one of them")
        pictures = [Entry(image=frame) for frame in draw_frames(row["video"], context)]
        turns = _expand_video(turns, len(pictures))
    return with_pictures(turns, pictures)


def _turns(row: dict) -> list[Turn]:
    conversation = row.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise DataFault("bad_row", "key conversations must be a non-empty list of {from, value}")
    turns = []
    for i, turn in enumerate(conversation):
        who, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if who not in ("human", "gpt") or not isinstance(value, str):
            raise DataFault("bad_row", f"turn {i} must be {{from: human or gpt, value: text}}, found from: {who!r}")
        turns.append((who, value, fields.switch(turn, "loss", f"turn {i}")))
    return turns


def _expand_video(turns: list[Turn], num_frames: int) -> list[Turn]:
    """Put one mark per frame in place of the video mark of the first human turn that has one."""
    for i, (who, value, loss) in enumerate(turns):
        if who == "human" and VIDEO in value:
            return [*turns[:i], (who, value.replace(VIDEO, IMAGE * num_frames, 1), loss), *turns[i + 1 :]]
    raise DataFault("bad_row", f"has a video but no {VIDEO} in a human turn")


FORMAT = Format(entries, required=["conversations"], optional=["image", "video"])
