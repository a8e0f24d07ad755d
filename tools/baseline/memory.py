"""Peak memory of a piece of work, from Linux's own count of the process's resident pages."""

import re
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")


def _kilobytes(field: str) -> int:
    return int(re.search(rf"{field}:\s*(\d+) kB", _STATUS.read_text())[1])


def resident() -> float:
    """MiB that are resident now."""
    return _kilobytes("VmRSS") / 1024


def peak_memory(work: Callable[[], None]) -> float:
    """MiB that `work` adds at its peak to what was resident before."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident()
    work()
    return _kilobytes("VmHWM") / 1024 - before
