"""Starts the process group and megatron-core's parallel state, and says where this rank sits: a `Layout`.

The layout is returned and passed on; megatron-core's own parallel_state is the only global state. No model, no data.
"""

import dataclasses
import inspect
import math
import os
import random
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megabagel.config.errors import ConfigError
from megabagel.config.schema import ParallelConfig
from megabagel.runtime import cpu_megatron, failure
from megabagel.runtime.host_memory import keep_freed_blocks

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Layout:
    """Where this rank sits. A model replica is all ranks of one data-parallel index: tensor x context x pipeline."""

    rank: int
    world_size: int
    device: torch.device
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    replica_ranks: tuple[int, ...]  # global ranks of this rank's replica
    replica_group: dist.ProcessGroup  # gloo, for plans: Python objects and CPU tensors
    replica_device_group: dist.ProcessGroup  # of the same ranks, for tensors on `device`
    sources_group: dist.ProcessGroup | None  # gloo, of the source ranks of all replicas; None elsewhere

    @property
    def source_rank(self) -> int:
        """Global rank that reads data for this replica: its tensor-parallel rank 0 of the first stage."""
        return self.replica_ranks[0]

    @property
    def is_source(self) -> bool:
        return self.rank == self.source_rank

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_last_stage_writer(self) -> bool:
        """True on the one rank that writes logs: it holds the losses (first of the last stage of replica 0)."""
        return self.is_last_stage and self.dp_rank == 0 and self.rank == self.last_stage_ranks[0]

    @property
    def last_stage_ranks(self) -> tuple[int, ...]:
        """Global ranks of this replica that hold the last pipeline stage."""
        return self.replica_ranks[-(len(self.replica_ranks) // self.pp_size) :]


def initialize(parallel: ParallelConfig, seed: int, timeout: timedelta = _TIMEOUT) -> Layout:
    """Join the process group of torchrun's environment (or start one of a single process) and lay the model out.

    Fields of `parallel` that megatron-core's `initialize_model_parallel` knows by the same name are passed to it. All
    generators start from `seed`: torch, NumPy and Python alike on every rank, megatron-core's per tensor-parallel rank.
    `timeout`: how long a rank waits for others in a collective.
    Raises ValueError when the ranks are not a multiple of what one model replica needs.
    """
    cpu_megatron.install()
    device = _device()
    if device.type == "cpu":
        keep_freed_blocks()
    _start_process_group(device, timeout)
    world_size = dist.get_world_size()
    sizes = _megatron_arguments(parallel)
    replica = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    if world_size % replica:
        dist.destroy_process_group()
        raise ValueError(
            f"{world_size} processes cannot hold model replicas of {replica} ranks "
            f"(the product of the model-parallel sizes in `parallel`); start a multiple of {replica} processes"
        )
    # an expert is never split: more expert-parallel ranks serve the same end
    minutes = math.ceil(timeout.total_seconds() / 60)
    parallel_state.initialize_model_parallel(
        **sizes, expert_tensor_parallel_size=1, distributed_timeout_minutes=minutes
    )
    _seed(seed)
    ranks, group, device_group, sources_group = _replica(parallel.context_parallel_size, device, timeout)
    return Layout(
        rank=dist.get_rank(),
        world_size=world_size,
        device=device,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        replica_ranks=ranks,
        replica_group=group,
        replica_device_group=device_group,
        sources_group=sources_group,
    )


def world_size() -> int:
    """Processes of this run as its launcher (torchrun) counts them, known before they meet; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def destroy() -> None:
    """Leave all process groups; safe when none were started."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= devices:
        raise ConfigError(f"process {local_rank} of this machine has no GPU: there are {devices}; start one per GPU.")
    # one queue of kernels: communication starts in the order in which tensor parallelism issued it
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _start_process_group(device: torch.device, timeout: timedelta) -> None:
    if dist.is_initialized():  # the caller lays several models out one after the other
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = failure.shared_store("groups")
    if store is not None:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    elif "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _megatron_arguments(parallel: ParallelConfig) -> dict:
    known = inspect.signature(parallel_state.initialize_model_parallel).parameters
    fields = dataclasses.asdict(parallel)
    return {name: value for name, value in fields.items() if name in known}


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _replica(
    context_parallel_size: int, device: torch.device, timeout: timedelta
) -> tuple[tuple[int, ...], dist.ProcessGroup, dist.ProcessGroup, dist.ProcessGroup | None]:
    """Ranks of this rank's replica, a gloo group of them, one for the device's tensors, and a gloo group of the first
    ranks of all replicas.

    Every rank makes the groups of all replicas, in order.
    """
    generator = parallel_state.RankGenerator(
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        ep=1,
        dp=parallel_state.get_data_parallel_world_size(),
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
        cp=context_parallel_size,
        order="tp-cp-ep-dp-pp",
    )
    mine, replicas = None, generator.get_ranks("tp-cp-pp")  # in the order of data parallelism
    for ranks in replicas:
        group = dist.new_group(ranks, backend="gloo", timeout=timeout)
        device_group = group if device.type == "cpu" else dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            mine = tuple(ranks), group, device_group
    sources = [ranks[0] for ranks in replicas]
    sources_group = dist.new_group(sources, backend="gloo", timeout=timeout)
    return *mine, sources_group if dist.get_rank() in sources else None


def gather_objects(group: dist.ProcessGroup, value: object) -> list:
    """The picklable values of all ranks of a CPU group, in their order."""
    values = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
