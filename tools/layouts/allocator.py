"""The peak of memory while a piece of work runs, from the allocator's own record of every allocation and release.

Counts what the CPU allocator of torch hands out, temporaries inside operators included; not what the process holds.
"""

import time

import torch
from torch.profiler import ProfilerActivity, profile


class AllocatorPeak:
    """Inside a `with` block, follows the allocator; afterwards `peak` is the most that was held beyond the start.

    In bytes. `stop()` ends the count early: what is allocated after its first call does not enter `peak`.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._end: int | None = None
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)

    def __enter__(self) -> "AllocatorPeak":
        self._profile.__enter__()
        return self

    def stop(self) -> None:
        """Leave out what follows."""
        if self._end is None:
            self._end = time.time_ns()

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)
        self.stop()
        changes = sorted(
            (event.start_ns(), event.nbytes())
            for event in self._profile.profiler.kineto_results.events()
            if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
        )
        held = 0
        for moment, size in changes:
            if moment > self._end:
                break
            held += size
            self.peak = max(self.peak, held)
