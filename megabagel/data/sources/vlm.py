"""Chats [{from, value}]: the official `vlm_sft` with a mark per picture, and `sft_chat`, which can do without marks.

`<image>` marks in what the human says take the row's pictures in order; `<video>` takes frames. Answers are learnt.
"""

from megabagel.data.document import Entry
from megabagel.data.faults import DataFault
from megabagel.data.sources import fields
from megabagel.data.sources.context import Context
from megabagel.data.sources.format import Format
from megabagel.data.sources.frames import draw_frames

IMAGE, VIDEO = "<image>", "<video>"
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}

Turn = tuple[str, str, bool | None]  # speaker, text, loss if stated


def entries(row: dict, context: Context) -> list[Entry]:
    turns = _official_turns(row)
    pictures = _named_images(row, context)
    if row.get("video"):
        if pictures:
            raise DataFault("bad_row", "has both image and video; give one of them")
        pictures = [Entry(image=frame) for frame in draw_frames(row["video"], context)]
        turns = _expand_video(turns, len(pictures))
    markers = sum(value.count(IMAGE) for who, value, _ in turns if who == "human")
    if markers != len(pictures):
        raise DataFault("bad_row", f"{markers} {IMAGE} in the human turns, but {len(pictures)} pictures")
    return _in_order(turns, pictures)


def chat_entries(row: dict, context: Context) -> list[Entry]:
    """Without any mark, the pictures come before the first question."""
    turns = []
    for where, turn in fields.objects(row, "conversations"):
        who = _ROLES[fields.choice(turn, "from", tuple(_ROLES), where)]
        turns.append((who, fields.text(turn, "value", where), fields.switch(turn, "loss", where)))
    pictures = _named_images(row, context)
    markers = sum(value.count(IMAGE) for who, value, _ in turns if who == "human")
    if not markers:
        first = next((i for i, (who, *_) in enumerate(turns) if who == "human"), 0)
        return fields.learnt([*_in_order(turns[:first], []), *pictures, *_in_order(turns[first:], [])])
    if markers != len(pictures):
        raise DataFault("bad_row", f"{markers} {IMAGE} in the human turns, but {len(pictures)} pictures")
    return fields.learnt(_in_order(turns, pictures))


def _in_order(turns: list[Turn], pictures: list[Entry]) -> list[Entry]:
    """Turns as entries, each human one split at its marks. Text beside a mark loses its outer blanks."""
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


def _named_images(row: dict, context: Context) -> list[Entry]:
    names = row.get("image") or []
    names = names if isinstance(names, list) else [names]
    return [Entry(image=context.image(name)) for name in names]


def _official_turns(row: dict) -> list[Turn]:
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
SFT_CHAT = Format(chat_entries, required=["conversations"], optional=["image"])
