"""A video with a text: `video` (a folder or list of frames, or a container file), `text` and an optional `prompt`.

Drawn frames are shown, the prompt follows, the text is learnt.
"""

from megabagel.data.document import Entry
from megabagel.data.sources import fields
from megabagel.data.sources.context import Context
from megabagel.data.sources.format import Format
from megabagel.data.sources.frames import draw_frames


def entries(row: dict, context: Context) -> list[Entry]:
    video = next((row[name] for name in ("video", "mp4", "webm", "mkv") if row.get(name)), None)
    found = [Entry(image=frame) for frame in draw_frames(video, context)]
    if row.get("prompt") is not None:
        found.append(Entry(text=fields.text(row, "prompt")))
    return [*found, Entry(text=fields.text(row, "text"), loss=True)]


FORMAT = Format(entries, required=["text"], optional=["video", "prompt"])
