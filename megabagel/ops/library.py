"""Loads the compiled operators, or says once what their absence costs."""

import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def _older_than_its_sources(path: Path) -> bool:
    """In a checkout only: an installed package has no sources beside it."""
    sources = (Path(__file__).parents[2] / "csrc" / "ops").glob("*.*")
    return any(source.stat().st_mtime > path.stat().st_mtime for source in sources)


def _load() -> bool:
    path = Path(__file__).parent / "_device.so"
    if not path.exists() or _older_than_its_sources(path):
        logger.warning(
            "The C++ operators are %s, PyTorch code does their work: same results, slower, more memory. Build them "
            "with 'python csrc/build.py' (needs g++).",
            "older than their sources" if path.exists() else "not built",
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
    found = LOADED and _is_compiled(name, x.device.type)
    if LOADED and not found and x.is_cuda:
        _say_without_cuda()
    return found


@functools.cache
def _is_compiled(name: str, device: str) -> bool:
    name = f"megabagel::{name}"
    return torch._C._dispatch_has_kernel(name) and torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())


@functools.cache
def _say_without_cuda() -> None:
    logger.warning(
        "The C++ operators are built without CUDA, PyTorch code does their work: same results, slower, more memory. "
        "Build them again with 'python csrc/build.py' where nvcc is on PATH or in CUDA_HOME."
    )
