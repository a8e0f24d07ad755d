"""Keys and values of what a context has read, of every layer, in the order in which it was read.

Only storage: what is written behind the last kept row is scratch until `keep` says that it belongs to the context.
"""

import torch
from torch import Tensor

_FIRST_ROWS = 64  # of a buffer; it doubles when it is full


class KeyValueCache:
    """Of one context, the heads that this rank computes. Layers are counted from 0."""

    def __init__(self, layers: int):
        self.length = 0
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New rows [n, kv heads, d] go behind the kept ones. -> keys and values of both, [length + n, kv heads, d],
        views."""
        end = self.length + len(keys)
        held = self._buffers[layer]
        if held is None or len(held[0]) < end:
            held = self._buffers[layer] = self._grown(held, keys, end)
        for buffer, rows in zip(held, (keys, values), strict=True):
            buffer[self.length : end] = rows
        return held[0][:end], held[1][:end]

    def _grown(self, held: tuple[Tensor, Tensor] | None, like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        capacity = max(rows, 2 * self.length, _FIRST_ROWS)
        buffers = like.new_empty(2, capacity, *like.shape[1:]).unbind()
        if held is not None:
            for buffer, old in zip(buffers, held, strict=True):
                buffer[: self.length] = old[: self.length]
        return buffers

    def keep(self, rows: int) -> None:
        """The last `rows` written, in every layer, belong to the context from now on."""
        self.length += rows

    def keys(self) -> Tensor:
        """Kept keys of all layers, normalised and rotated: [layers, length, kv heads, d]. Raises ValueError when there
        are none."""
        if not self.length:
            raise ValueError("nothing has been kept in this cache")
        return torch.stack([keys[: self.length] for keys, _ in self._buffers])

    def copy(self) -> "KeyValueCache":
        """A cache of its own with the same kept rows."""
        twin = KeyValueCache(len(self._buffers))
        if self.length:
            twin._buffers = [self._grown(held, held[0], self.length) for held in self._buffers]
            twin.length = self.length
        return twin
