"""Conversation jsonl: `conversations` [{from: human | gpt, value}] with optional `image` (name or list) or `video`.

Human texts carry no loss and are split at `<image>`; gpt texts carry the loss. A video is a folder (or list) of frames.
"""

from pathlib import Path

import numpy as np

from megabagel.config.datasets import FrameSamplerArgs, GroupConfig
from megabagel.data.faults import DataFault, Fault
from megabagel.data.images import decode, to_pixels
from megabagel.data.jsonl import JsonLines
from megabagel.data.sample import Item, Sample
from megabagel.data.text import Tokenizer
from megabagel.runtime import rng

IMAGE, VIDEO = "<image>", "<video>"
_FRAME_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class VLMSource:
    """Questions about pictures (or none) and answers, in turns."""

    window = None  # lines are read one by one: shuffle all

    def __init__(self, name: str, group: GroupConfig, tokenizer: Tokenizer, seed: int) -> None:
        self._name, self._tokenizer, self._seed = name, tokenizer, seed
        self._transform = group.image_transform_args
        self._frames = group.frame_sampler_args or FrameSamplerArgs(max_num_frames=12)
        self._rows = JsonLines(group)
        self.blocks, self.origin = self._rows.blocks, self._rows.origin
        self.faults: list[Fault] = []

    def sample(self, row: int, key: tuple[int, ...]) -> Sample:
        """Raises DataFault when the line cannot be used."""
        content = self._rows[row]
        turns = _turns(content)
        names = content.get("image") or []
        files = [Path(self._rows.folder(row)) / name for name in ([names] if isinstance(names, str) else names)]
        if content.get("video"):
            if files:
                raise DataFault("bad_row", "has both image and video; give one of them")
            files = self._draw_frames(content["video"], Path(self._rows.folder(row)), key)
            turns = _expand_video(turns, len(files))
        markers = sum(value.count(IMAGE) for who, value in turns if who == "human")
        if markers != len(files):
            raise DataFault("bad_row", f"{markers} {IMAGE} in the human turns, but {len(files)} pictures")
        items: list[Item] = []
        pictures = iter(files)
        for who, value in turns:
            if who == "gpt":
                items.append(Item("text", loss=True, text_ids=self._tokenizer.encode(value)))
                continue
            parts = value.split(IMAGE)
            for i, part in enumerate(parts):
                text = part.strip() if len(parts) > 1 else part
                if text or len(parts) == 1:
                    items.append(Item("text", text_ids=self._tokenizer.encode(text)))
                if i < len(parts) - 1:
                    pixels = to_pixels(decode(next(pictures)), self._transform, len(files))
                    items.append(Item("vit_image", pixels=pixels))
        return Sample(items, key, self._name, self.origin(row))

    def _draw_frames(self, video: str | list[str], folder: Path, key: tuple[int, ...]) -> list[Path]:
        """Frame files of a video: one drawn from each of n equal stretches, n drawn between the sampler's bounds."""
        if isinstance(video, str):
            path = folder / video
            if path.is_file():
                raise DataFault("video_container", f"video {path} is a container file; give a folder of its frames")
            if not path.is_dir():
                raise DataFault("missing_file", f"video folder {path} does not exist")
            frames = sorted(file for file in path.iterdir() if file.suffix.lower() in _FRAME_SUFFIXES)
        else:
            frames = [folder / name for name in video]
        if not frames:
            raise DataFault("bad_row", f"video {video} has no frames")
        draw = rng.generator(self._seed, "video_frames", key)
        most = max(1, min(self._frames.max_num_frames, len(frames)))
        number = int(draw.integers(min(self._frames.min_num_frames, most), most + 1))
        edges = np.linspace(0, len(frames), number + 1).astype(int)
        return [frames[int(draw.integers(a, max(a + 1, b)))] for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _turns(content: dict) -> list[tuple[str, str]]:
    """(speaker, text) of each turn, checked."""
    conversation = content.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise DataFault("bad_row", "key conversations must be a non-empty list of {from, value}")
    turns = []
    for i, turn in enumerate(conversation):
        who, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if who not in ("human", "gpt") or not isinstance(value, str):
            raise DataFault("bad_row", f"turn {i} must be {{from: human or gpt, value: text}}, found from: {who!r}")
        turns.append((who, value))
    return turns


def _expand_video(turns: list[tuple[str, str]], num_frames: int) -> list[tuple[str, str]]:
    """Put one image marker per frame in place of the video marker of the first human turn that has one."""
    for i, (who, value) in enumerate(turns):
        if who == "human" and VIDEO in value:
            return [*turns[:i], (who, value.replace(VIDEO, IMAGE * num_frames, 1)), *turns[i + 1 :]]
    raise DataFault("bad_row", f"has a video but no {VIDEO} in a human turn")
