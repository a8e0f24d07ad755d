"""Lets a forward pass go by without a trace in the statistics from which delayed FP8 scaling derives its scales.

Transformer Engine updates scales only where gradients are on, but its kernels note the largest values in any case.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn


@contextlib.contextmanager
def forgotten(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, what passes through `modules` and all below them leaves no mark on later scales.

    Nothing to do for other recipes than `delayed`, which keep no history.
    """
    # in place: the quantizers hold views of these tensors
    histories = [
        meta["scaling_fwd"].amax_history
        for root in modules
        for module in root.modules()
        if (meta := getattr(module, "fp8_meta", None)) and hasattr(meta.get("scaling_fwd"), "amax_history")
    ]
    before = [history.clone() for history in histories]
    try:
        yield
    finally:
        with torch.no_grad():
            for history, values in zip(histories, before, strict=True):
                history.copy_(values)
