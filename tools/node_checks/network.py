"""Measures on every rank: a matrix product, an all-reduce of all ranks, a link to a neighbour on another node.

Sizes are for seconds, not for records. Whether a number is bad is decided in `judge.py`.
"""

import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist


class Sizes:
    """Of what is computed and sent, for GPUs or for a CPU."""

    def __init__(self, on_gpu: bool) -> None:
        self.matrix = 8192 if on_gpu else 256
        self.all_reduce_bytes = 256 << 20 if on_gpu else 1 << 20
        self.link_bytes = 64 << 20 if on_gpu else 1 << 20
        self.repeats = 5 if on_gpu else 2


class Network:
    """The process group of all ranks, for as long as it is measured. Call its methods on all ranks in one order."""

    def __init__(self, rank: int, size: int, local_rank: int, local_size: int, seconds: float, store: dist.Store):
        on_gpu = torch.cuda.is_available()
        self.rank, self.size, self.local_size = rank, size, local_size
        self.device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        self.sizes = Sizes(on_gpu)
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))

    def compute(self) -> dict[str, float]:
        """`tflops` of a matrix product, and `product`: the sum of its values, alike on equal devices."""
        n = self.sizes.matrix
        generator = torch.Generator().manual_seed(1)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        a, b = (torch.rand(n, n, generator=generator).to(self.device, dtype) for _ in range(2))
        seconds = self._time(lambda: a @ b)
        return {"tflops": 2 * n**3 / seconds / 1e12, "product": float((a @ b).double().sum())}

    def all_reduce(self) -> dict[str, float]:
        """`wrong` elements of a sum over all ranks, and `all_reduce`: GB/s of bus bandwidth (NCCL's definition)."""
        count = self.sizes.all_reduce_bytes // 8
        own = torch.arange(count, device=self.device, dtype=torch.float64) % 251
        summed = own + self.rank
        dist.all_reduce(summed)
        expected = own * self.size + self.size * (self.size - 1) / 2  # integers: exact in float64
        wrong = int((summed != expected).sum())
        seconds = self._time(lambda: dist.all_reduce(summed.fill_(1)))
        bus = 2 * (self.size - 1) / self.size
        return {"wrong": wrong, "all_reduce": bus * self.sizes.all_reduce_bytes / seconds / 1e9}

    def links(self) -> dict[str, float]:
        """`link`: GB/s both ways to a rank of a neighbouring node (or of this one, where there is no other), the better
        of two neighbours: a slow rank is slow with both, its neighbours are not."""
        unit = self.local_size if self.size > self.local_size else 1
        mine, units = self.rank // unit, self.size // unit
        best = 0.0
        for shift in (0, 1) if units > 2 else (0,):
            place = (mine - shift) % units
            if place == units - 1 and units % 2:  # an odd one out
                continue
            neighbour = (mine + 1 if place % 2 == 0 else mine - 1) % units
            best = max(best, self._link(neighbour * unit + self.rank % unit))
        return {"link": best}

    def _link(self, peer: int) -> float:
        sent, received = (torch.ones(self.sizes.link_bytes, dtype=torch.uint8, device=self.device) for _ in range(2))

        def exchange() -> None:
            ways = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
            for way in dist.batch_isend_irecv(ways):
                way.wait()

        return self.sizes.link_bytes / self._time(exchange) / 1e9

    def _time(self, call: Callable[[], object]) -> float:
        """Median seconds of a call, after one that is not counted."""
        call()
        times = []
        for _ in range(self.sizes.repeats):
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
