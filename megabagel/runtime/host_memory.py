"""Lets glibc keep large blocks that were freed, for runs on the CPU.

By default each one goes back to the kernel, which clears every page again when the next layer asks for as much: a
large share of the time of an elementwise operator.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_blocks() -> None:
    """Of this process, until it ends; where there is no glibc nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
