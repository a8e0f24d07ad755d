"""How much memory the fullest rank of a run takes: of its process on the host, and of its GPU."""

import psutil
import torch
import torch.distributed as dist


def fullest(device: torch.device) -> dict[str, float | None]:
    """Bytes: `host_memory_bytes` that a process has in memory now, `memory_bytes` and `reserved_bytes` of a GPU at most
    so far, None without one. The largest over all ranks; every rank must call it."""
    on_gpu = device.type == "cuda"
    own = [psutil.Process().memory_info().rss]
    if on_gpu:
        own += [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    largest = torch.tensor(own, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    host, *of_gpu = largest.tolist()
    allocated, reserved = of_gpu or (None, None)
    return {"host_memory_bytes": host, "memory_bytes": allocated, "reserved_bytes": reserved}
