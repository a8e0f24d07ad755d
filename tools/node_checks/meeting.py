"""Where ranks leave what they found and the first rank collects it: torchrun's store, which works before any network
of ranks does and names the ranks that say nothing. Values are JSON.
"""

import json
import os
import time
from datetime import timedelta

import torch.distributed as dist


class Meeting:
    """One rank's seat. A process that torchrun did not start is alone."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        store = dist.HashStore()
        if "MASTER_ADDR" in os.environ:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # of torchrun's agent where it shares its own, else the first rank's
            is_master = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            store = dist.TCPStore(*address, is_master=is_master, timeout=timedelta(seconds=60))
        self.store = dist.PrefixStore("megabagel/preflight", store)

    def say(self, topic: str, value: object) -> None:
        """Leave this rank's value."""
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))

    def hear(self, topic: str, rank: int, seconds: float) -> object:
        """What `rank` said; waits for it. Raises torch's DistStoreError after `seconds`."""
        key = f"{topic}/{rank}"
        self.store.wait([key], timedelta(seconds=seconds))
        return json.loads(self.store.get(key))

    def collect(self, topic: str, seconds: float) -> tuple[dict[int, object], list[int]]:
        """What all ranks said within `seconds`, by rank, and the ranks that said nothing."""
        said, deadline = {}, time.monotonic() + seconds
        for rank in range(self.size):
            try:
                said[rank] = self.hear(topic, rank, max(0.05, deadline - time.monotonic()))
            except dist.DistStoreError:
                continue
        return said, [rank for rank in range(self.size) if rank not in said]

    def leave(self, seconds: float = 5.0) -> None:
        """Nothing is said or heard after this. The first rank, in whose process the store may be, leaves last."""
        left, deadline = self.store.add("left", 1), time.monotonic() + seconds
        while self.rank == 0 and left < self.size and time.monotonic() < deadline:
            time.sleep(0.05)
            left = self.store.add("left", 0)
