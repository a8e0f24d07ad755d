"""Frames of a video, drawn anew at each visit: from a folder, a list of names, or a container file.

Container files need the optional package PyAV; what is done with the frames is decided by formats.
"""

import io
import os
from typing import BinaryIO

import numpy as np

from megabagel.data.document import ImageSource
from megabagel.data.faults import DataFault
from megabagel.data.files import storage
from megabagel.data.files.pictures import PICTURE_SUFFIXES
from megabagel.data.sources.context import Context


def draw_frames(video: object, context: Context) -> list[ImageSource]:
    """One frame drawn from each of n equal stretches, n drawn between the sampler's bounds. Raises DataFault."""
    if isinstance(video, bytes):
        return _decoded(io.BytesIO(video), "the video", context)
    if isinstance(video, list):
        return [context.image(video[i], i) for i in _draw_numbers(len(video), "the list video", context)]
    if not isinstance(video, str) or not video:
        raise DataFault("bad_row", "video must be a folder of frames, a list of frames or a video file")
    path = context.path(video)
    try:
        if storage.is_file(path):
            with storage.open_binary(path) as file:
                return _decoded(file, path, context)
        frames = storage.list_files(path, PICTURE_SUFFIXES)
    except OSError as error:
        raise DataFault("missing_file", f"video {path} cannot be read ({error.strerror or error})") from None
    if not frames and not storage.is_folder(path):
        raise DataFault("missing_file", f"video folder {path} does not exist")
    names = [f"{video.rstrip('/')}/{os.path.basename(frame)}" for frame in frames]
    return [context.image(names[i], i) for i in _draw_numbers(len(names), f"video folder {path}", context)]


def _draw_numbers(total: int, what: str, context: Context) -> list[int]:
    if not total:
        raise DataFault("bad_row", f"{what} has no frames")
    draw = context.generator("video_frames")
    most = max(1, min(context.frames.max_num_frames, total))
    number = int(draw.integers(min(context.frames.min_num_frames, most), most + 1))
    edges = np.linspace(0, total, number + 1).astype(int)
    return [int(draw.integers(a, max(a + 1, b))) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _decoded(file: BinaryIO, what: str, context: Context) -> list[ImageSource]:
    """Drawn frames of a container, as bitmaps in memory. Raises DataFault."""
    try:
        import av
    except ImportError:
        message = f"video {what} is a container file; give a folder of its frames or pip install megabagel[video]"
        raise DataFault("video_container", message) from None
    frames = []
    try:
        with av.open(file) as container:
            if not container.streams.video:
                raise DataFault("undecodable_video", f"{what} holds no video stream")
            wanted = _draw_numbers(_count(container), what, context)
            container.seek(0)
            for number, frame in enumerate(container.decode(video=0)):
                if number == wanted[len(frames)]:
                    frames.append(ImageSource(number, content=_bitmap(frame)))
                if len(frames) == len(wanted):
                    break
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DataFault("undecodable_video", f"{what} cannot be decoded ({error})") from None
    if len(frames) < len(wanted):
        raise DataFault("undecodable_video", f"{what} ends after {number} frames, before frame {wanted[len(frames)]}")
    return frames


def _count(container) -> int:
    """Number of frames of the first video stream; its header may leave it out."""
    return container.streams.video[0].frames or sum(packet.size > 0 for packet in container.demux(video=0))


def _bitmap(frame) -> bytes:
    buffer = io.BytesIO()
    frame.to_image().save(buffer, "BMP")
    return buffer.getvalue()
