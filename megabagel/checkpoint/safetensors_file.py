"""Writes safetensors files tensor by tensor, from several processes and after an interruption.

The format (github.com/huggingface/safetensors): a little-endian uint64 length, a JSON header of that length, the data.
The header is written first, then every tensor goes to its own place; the safetensors library itself wants all of a
file's tensors in memory at once.
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Spec:
    """A tensor that is going to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """One file whose tensors are known before their content is."""

    def __init__(self, path: Path, specs: dict[str, Spec]):
        self.path, self.specs = path, specs
        header: dict = {"__metadata__": {"format": "pt"}}
        self._offsets, end = {}, 0
        for name, spec in specs.items():
            self._offsets[name] = end
            header[name] = {
                "dtype": DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [end, end + spec.num_bytes],
            }
            end += spec.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as the library writes it
        self._head = struct.pack("<Q", len(text)) + text
        self.num_bytes = len(self._head) + end

    def begin(self) -> None:
        """Create the file at its full size, header first."""
        with self.path.open("wb") as file:
            file.write(self._head)
            file.truncate(self.num_bytes)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place, in the dtype and shape announced."""
        spec = self.specs[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, announced was {list(spec.shape)}")
        data = memoryview(tensor.to(spec.dtype).contiguous().flatten().view(torch.uint8).numpy())
        at = len(self._head) + self._offsets[name]
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            while data:
                written = os.pwrite(descriptor, data, at)
                data, at = data[written:], at + written
        finally:
            os.close(descriptor)
