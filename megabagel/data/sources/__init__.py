"""From a row of a group's files to its document: a list of entries in reading order. One class serves all formats.

A format is a function in a file of its own, registered here. How a document is laid out is decided in `document.py`.
"""

from dataclasses import replace

from megabagel.config.datasets import FrameSamplerArgs, GroupConfig
from megabagel.data.document import Entry
from megabagel.data.faults import DataError
from megabagel.data.files import open_rows
from megabagel.data.sources import (
    captions,
    chat,
    conversations,
    edit,
    editing_steps,
    pair,
    sequence,
    t2i,
    text,
    video,
    vlm,
)
from megabagel.data.sources.context import Context
from megabagel.data.sources.format import Format

FORMATS: dict[str, Format] = {
    "t2i_pretrain": t2i.FORMAT,
    "unified_edit": edit.FORMAT,
    "vlm_sft": vlm.FORMAT,
    "conversations": conversations.FORMAT,
    "text_to_image": captions.TEXT_TO_IMAGE,
    "image_to_text": captions.IMAGE_TO_TEXT,
    "multi_step_editing": editing_steps.FORMAT,
    "sequence": sequence.SEQUENCE,
    "interleaved": sequence.INTERLEAVED,
    "pretrain_pair": pair.FORMAT,
    "sft_chat": chat.FORMAT,
    "text": text.FORMAT,
    "video": video.FORMAT,
}


class Source:
    """Random access to the documents of a group.

    `blocks`, `window`, `faults`, `files`: as of `files.Rows`.
    """

    def __init__(self, name: str, group: GroupConfig, seed: int) -> None:
        group = replace(group, format=group.format or name)
        self._format = FORMATS[group.format]
        self._rows = open_rows(group, self._format.columns, self._format.required)
        self._seed = seed
        self._frames = group.frame_sampler_args or FrameSamplerArgs(max_num_frames=12)
        self.blocks, self.window, self.faults = self._rows.blocks, self._rows.window, self._rows.faults
        self.files = self._rows.files

    def origin(self, row: int) -> str:
        """File and row in it, for messages."""
        return self._rows.origin(row)

    def document(self, row: int, key: tuple[int, ...]) -> list[Entry]:
        """Entries of the row. `key` (group, row, visit) decides what is drawn. Raises DataFault when the row cannot be
        used."""
        content = self._rows[row]
        folder, sizes = self._rows.folder(row), self._rows.sizes(row)
        return self._format.entries(content, Context(key, self._seed, folder, content, self._frames, sizes))


def open_source(name: str, group: GroupConfig, seed: int) -> Source:
    """Open group `name`. Raises DataError when its files are missing or none of them can be read."""
    source = Source(name, group, seed)
    if not sum(source.blocks):
        reason = f"; the first fault: {source.faults[0]}" if source.faults else ""
        raise DataError(f"group {name} has no readable row{reason}. Fix the data or remove the group.")
    return source
