"""Reads and writes safetensors files part by part, from several processes and after an interruption.

The format (github.com/huggingface/safetensors): a little-endian uint64 length, a JSON header of that length, the data.
The safetensors library maps files into memory, where every page that was read counts as the process's own, and wants
all tensors of a file it writes in memory at once.
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megabagel.checkpoint.errors import CheckpointError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAMES = {name: dtype for dtype, name in DTYPES.items()}
_MAX_HEADER = 1 << 30


@dataclass(frozen=True)
class Spec:
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def make_head(specs: dict[str, Spec]) -> bytes:
    """Length and header of a file that holds `specs` in this order."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.num_bytes
        header[name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as the library writes it
    return struct.pack("<Q", len(text)) + text


def read_head(path: Path) -> bytes:
    """Length and header of `path`, whose data is left alone. Raises CheckpointError when it is cut short."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            (length,) = struct.unpack("<Q", prefix)
            head = prefix + file.read(length if length < _MAX_HEADER else 0)
    except (OSError, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read as a safetensors file ({error}); copy it again") from None
    if len(head) != 8 + length:
        raise CheckpointError(f"{path} is not a whole safetensors file ({path.stat().st_size} bytes); copy it again")
    return head


def divide(specs: dict[str, Spec], max_file_bytes: int) -> list[dict[str, Spec]]:
    """In files of at most so many bytes each, in order; a tensor that is larger has a file of its own."""
    parts: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if parts[-1] and filled + spec.num_bytes > max_file_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = spec
        filled += spec.num_bytes
    return parts


class SafetensorsFile:
    """One file whose tensors are known; `head` (see `make_head`, `read_head`) says where they are."""

    def __init__(self, path: Path, head: bytes):
        """Raises CheckpointError when `head` is no header."""
        self.path, self.head = path, head
        self.specs: dict[str, Spec] = {}
        self._offsets: dict[str, int] = {}
        try:
            for name, entry in json.loads(head[8:]).items():
                if name != "__metadata__":
                    self.specs[name] = spec = Spec(tuple(entry["shape"]), _NAMES[entry["dtype"]])
                    self._offsets[name], end = entry["data_offsets"]
                    if end - self._offsets[name] != spec.num_bytes:
                        raise ValueError(f"{name} has {end - self._offsets[name]} bytes")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} has no safetensors header that can be used ({error}); copy it again"
            ) from None
        ends = [self._offsets[name] + spec.num_bytes for name, spec in self.specs.items()]
        self.num_bytes = len(head) + max(ends, default=0)

    def check_size(self) -> None:
        """Raises CheckpointError when the file on the disk is shorter or longer than its header says."""
        if (found := self.path.stat().st_size) != self.num_bytes:
            raise CheckpointError(
                f"{self.path} is not a whole safetensors file: {found} bytes instead of {self.num_bytes}; copy it again"
            )

    def begin(self) -> None:
        """Create the file at its full size, header first."""
        with self.path.open("wb") as file:
            file.write(self.head)
            file.truncate(self.num_bytes)

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Put whole rows of one tensor in their place, from `row` on, in the dtype announced."""
        spec = self.specs[name]
        if (
            tuple(tensor.shape[1:]) != spec.shape[1:] or row + len(tensor) > spec.shape[0]
            if spec.shape
            else tensor.dim()
        ):
            raise ValueError(f"{name}: {list(tensor.shape)} from row {row} on do not fit into {list(spec.shape)}")
        data = _bytes(tensor.to(spec.dtype).contiguous())
        at = self._at(name, row)
        with self.path.open("r+b", buffering=0) as file:
            while data:
                written = os.pwrite(file.fileno(), data, at)
                data, at = data[written:], at + written

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` (None: the last) of one tensor, in memory of their own."""
        spec = self.specs[name]
        rows = () if not spec.shape else ((spec.shape[0] if stop is None else stop) - start,)
        out = torch.empty((*rows, *spec.shape[1:]), dtype=spec.dtype)
        data = _bytes(out)
        at = self._at(name, start)
        with self.path.open("rb", buffering=0) as file:
            while data:
                count = os.preadv(file.fileno(), [data], at)
                if not count:
                    raise CheckpointError(f"{self.path} ends within the tensor {name}; copy it again")
                data, at = data[count:], at + count
        return out

    def _at(self, name: str, row: int) -> int:
        shape = self.specs[name].shape
        width = math.prod(shape[1:]) * self.specs[name].dtype.itemsize
        return len(self.head) + self._offsets[name] + row * width


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
