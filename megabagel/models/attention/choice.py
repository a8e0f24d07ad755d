"""Which backend computes attention, and its plan for one packed sequence.

The backends are in files of their own; here is only the choice and what every table of problems must obey.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megabagel.config.errors import ConfigError
from megabagel.models.attention.flex import FlexPlan, compiled
from megabagel.models.attention.sdpa import BlockPlan
from megabagel.models.attention.sdpa_loop import LoopPlan
from megabagel.models.attention.varlen import VarlenPlan
from megabagel.models.attention.varlen_kernels import find_kernel, runs_half_precision

BACKENDS = ("sdpa", "varlen", "flex")


class AttentionPlan(Protocol):
    """Attention over the problems of one packed sequence, ready on the device; every layer calls it."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [L, heads, d], k and v [L, kv heads, d] in attention order -> [L, heads, d]; scale 1/sqrt(d).

        heads is a multiple of kv heads; query head i uses key head i // (heads / kv heads).
        """


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """One of `BACKENDS` for `kernels.attention_backend`, which may be auto.

    auto: sdpa on the CPU and for float32 and float64; else varlen where a kernel for it is installed, else flex.
    Raises ConfigError for a name that is none, and for a backend that cannot train on the device.
    """
    if backend == "auto":
        if device.type != "cuda" or not runs_half_precision(dtype):
            return "sdpa"
        return "varlen" if find_kernel(device) is not None else "flex"
    if backend not in BACKENDS:
        raise ConfigError(f"kernels.attention_backend `{backend}` is unknown; allowed are auto, {', '.join(BACKENDS)}.")
    if backend != "sdpa" and device.type != "cuda":
        raise ConfigError(
            f"kernels.attention_backend {backend} trains on CUDA only, but the device is {device}; set auto or sdpa."
        )
    if backend == "varlen":
        if find_kernel(device) is None:
            raise ConfigError(
                "kernels.attention_backend varlen finds no kernel on this machine; install flash-attn (pip install "
                "flash-attn --no-build-isolation), Transformer Engine or torch 2.10 or newer for a GPU of compute "
                "capability 8.0 or higher, or set flex or sdpa."
            )
        if not runs_half_precision(dtype):
            raise ConfigError(
                f"kernels.attention_backend varlen computes in bfloat16 or float16, but the model is in {dtype}; set "
                f"training.params_dtype to bf16, or the backend to sdpa or flex."
            )
    return backend


def prepare_attention(
    problems: Tensor, length: int, backend: str, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> AttentionPlan:
    """The plan of `problems` (int64 [P, 5] on the CPU, see `packing.plan.Problem`) over `length` positions.

    `backend` as in `choose_backend`; `dtype` is that of the queries to come and matters on CUDA only. Raises ValueError
    when the queries of the problems are not each position exactly once or a prefix leaves the sequence.
    """
    chosen, table = choose_backend(backend, device, dtype), problems.numpy()
    check_problems(table, length)
    if chosen == "varlen":
        return VarlenPlan(table, find_kernel(device), device)
    if chosen == "flex":
        return FlexPlan(table, length, device, compiled())
    return BlockPlan(table) if device.type == "cpu" else LoopPlan(table)


def check_problems(problems: np.ndarray, length: int) -> None:
    """Raise ValueError unless `problems` [P, 5] is a table over `length` positions; see `prepare_attention`."""
    if problems.ndim != 2 or problems.shape[1] != 5 or problems.dtype != np.int64:
        raise ValueError(f"attention problems must be int64 [P, 5], not {problems.dtype} {list(problems.shape)}")
    start, size, prefix_start, prefix_size, causal = problems[np.argsort(problems[:, 0], kind="stable")].T
    if (size < 1).any() or (start != np.cumsum(size) - size).any() or size.sum() != length:
        raise ValueError(f"the queries of attention problems must be each of the {length} positions exactly once")
    if (prefix_start < 0).any() or (prefix_size < 0).any() or (prefix_start + prefix_size > length).any():
        raise ValueError(f"the prefix of an attention problem must lie inside the {length} positions")
    if ((causal != 0) & (causal != 1)).any():
        raise ValueError("the last column of attention problems is 0 (full) or 1 (causal)")
