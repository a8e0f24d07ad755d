"""Random arguments of operators, with NaN in front of and behind every one of them.

An operator that reads out of bounds meets a NaN and one that writes there destroys it.
"""

import random

import torch
from torch import Tensor

_GUARD = 64  # values; a multiple of 16 bytes in every type


class Draw:
    """Draws for one call: floats in `dtype`, about `rows` x `width` values. Misaligned: no tensor begins at a multiple
    of 16 bytes, as with a slice of a larger one."""

    def __init__(self, seed: int, rows: int, width: int, dtype: torch.dtype, device: torch.device, misaligned: bool):
        self.random = random.Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.rows, self.width, self.dtype, self.device = rows, width, dtype, device
        self._offset = _GUARD + misaligned
        self._guarded: list[tuple[Tensor, int]] = []  # buffer, values inside

    def floats(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
        """N(0, 1); a leaf that wants a gradient unless `grad` is false."""
        values = torch.randn(shape, generator=self.generator, device=self.device)
        buffer = torch.full((values.numel() + 2 * _GUARD,), torch.nan, dtype=dtype or self.dtype, device=self.device)
        inside = buffer[self._offset : self._offset + values.numel()].view(shape)
        inside.copy_(values)
        self._guarded.append((buffer, values.numel()))
        return inside.requires_grad_(grad)

    def permutation(self, count: int) -> Tensor:
        """int64 [count]"""
        return torch.randperm(count, generator=self.generator, device=self.device)

    def subset(self, count: int, of: int) -> Tensor:
        """`count` different numbers below `of`, increasing: int64."""
        return self.permutation(of)[:count].sort().values

    def placement(self, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        """Which of `inputs` rows each of the `outputs` rows is, and the way back, -1: nowhere. outputs <= inputs."""
        order = self.permutation(inputs)[:outputs]
        inverse = torch.full((inputs,), -1, device=self.device)
        inverse[order] = torch.arange(outputs, device=self.device)
        return order, inverse

    def guards_are_whole(self) -> bool:
        """Whether the NaNs around every tensor are still there."""
        return all(
            bool(buffer[: self._offset].isnan().all() and buffer[self._offset + count :].isnan().all())
            for buffer, count in self._guarded
        )
