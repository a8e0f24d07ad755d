"""Plain chats: `conversations` [{from: human | gpt | system, value}] and `image`, with `<image>` marks or without.

Without any mark, the pictures come before the first question. Answers are learnt.
"""

from megabagel.data.document import Entry
from megabagel.data.sources import fields
from megabagel.data.sources.context import Context
from megabagel.data.sources.format import Format
from megabagel.data.sources.turns import IMAGE, Turn, named_images, with_pictures

_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


def entries(row: dict, context: Context) -> list[Entry]:
    turns: list[Turn] = []
    for where, turn in fields.objects(row, "conversations"):
        who = _ROLES[fields.choice(turn, "from", tuple(_ROLES), where)]
        turns.append((who, fields.text(turn, "value", where), fields.switch(turn, "loss", where)))
    pictures = named_images(row, context)
    if any(IMAGE in value for who, value, _ in turns if who == "human"):
        return fields.learnt(with_pictures(turns, pictures))
    first = next((i for i, (who, *_) in enumerate(turns) if who == "human"), 0)
    return fields.learnt([*with_pictures(turns[:first], []), *pictures, *with_pictures(turns[first:], [])])


FORMAT = Format(entries, required=["conversations"], optional=["image"])
