"""Rows, files and pictures as they come from strangers: mutations drawn from a generator, and hand-made bombs."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np

EVIL_NAMES = [
    "loop.png",
    "outside.png",
    "up/../../x.png",
    "../x.png",
    "/etc/passwd",
    "pipe.png",
    "folder.png",
    "a" * 5000,
]
EVIL_TEXTS = [
    "",
    " ",
    "\ud800",
    "\0",
    "<image>",
    "<video>" * 3,
    "<|im_end|>" * 50,
    "\u202e" * 400,
    "https://x.invalid/a.png",
]
EVIL_VALUES = [None, True, -1, 2**70, 1e308, float("nan"), [], {}, [[[]]], {"a": {}}, [None], ["", 3]]


def lay_traps(folder: Path) -> None:
    """What EVIL_NAMES stand for: links in a loop and to the outside, a pipe, a folder named like a picture."""
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "outside.png").symlink_to("/etc/hostname")
    (folder / "up").symlink_to("..")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")


def png_with(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (8, 8)) -> bytes:
    """An 8 x 8 PNG whose header claims `size`, with chunks (kind, content) before its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = (b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    rows = (b"IDAT", zlib.compress(bytes(8 * 25)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in (header, *chunks, rows, (b"IEND", b"")))


def mutated_bytes(content: bytes, draw: np.random.Generator) -> bytes:
    """`content` cut, overwritten, lengthened or with parts moved, mostly near its beginning, where headers are."""
    data = bytearray(content)
    for _ in range(int(draw.integers(1, 4))):
        reach = len(data) if draw.random() < 0.5 else min(len(data), 64)
        at, length = int(draw.integers(0, max(1, reach))), int(draw.integers(1, 9))
        kind = draw.integers(0, 6)
        if kind == 0:
            del data[at + length :]
        elif kind == 1:
            data[at : at + length] = draw.bytes(length)
        elif kind == 2:
            data[at : at + 4] = b"\xff\xff\xff\xff"
        elif kind == 3:
            data[at:at] = draw.bytes(length)
        elif kind == 4:
            del data[at : at + length]
        else:
            data[at : at + 4] = struct.pack(">I", int(draw.integers(0, 70000)))
    return bytes(data)


def mutated_value(value: object, draw: np.random.Generator) -> object:
    """A JSON value with one part of it, at any depth, replaced, taken away or doubled."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[int(draw.integers(0, len(keys)))]
        copy = value.copy()
        action = draw.random()
        if action < 0.15:
            del copy[key]
        elif action < 0.25 and isinstance(copy, list):
            copy.insert(key, copy[key])
        else:
            copy[key] = mutated_value(value[key], draw)
        return copy
    choices = [EVIL_VALUES, EVIL_NAMES, EVIL_TEXTS, [[value], {"x": value}, str(value) * 300]][int(draw.integers(0, 4))]
    return choices[int(draw.integers(0, len(choices)))]


def mutated_line(row: dict, draw: np.random.Generator) -> bytes:
    """A line of JSON: a mutated row, at times with its bytes mutated too (no newline in it)."""
    line = json.dumps(mutated_value(row, draw)).encode()
    if draw.random() < 0.3:
        line = mutated_bytes(line, draw).replace(b"\n", b"\xfe")
    return line or b"\xff"
