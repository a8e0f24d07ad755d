"""Loads the compiled operators, or says once what their absence costs."""

import logging
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def _load() -> bool:
    path = Path(__file__).parent / "_device.so"
    if not path.exists():
        logger.warning(
            "The C++ operators are not built, PyTorch code does their work: same results, slower, more memory. "
            "Build them with 'python csrc/build.py' (needs g++)."
        )
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        logger.warning(
            "The C++ operators could not be loaded (%s), PyTorch code does their work: same results, slower, more "
            "memory. Build them again with 'python csrc/build.py'.",
            error.__cause__ or error,
        )
        return False
    return True


LOADED = _load()


def has_kernel(name: str, x: Tensor) -> bool:
    """Whether operator `name` is compiled for the device of `x`."""
    return LOADED and torch._C._dispatch_has_kernel_for_dispatch_key(f"megabagel::{name}", x.device.type.upper())
