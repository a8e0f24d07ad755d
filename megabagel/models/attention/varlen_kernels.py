"""The variable-length attention kernels that a GPU machine may have, all behind one signature.

In order of preference: flash-attn, Transformer Engine, torch's own. They are imported when a run first asks for them.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor


@dataclass(frozen=True)
class VarlenCall:
    """What a kernel is told beside queries, keys and values: cumulative lengths int32 [problems + 1] of both."""

    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    max_seqlen_q: int
    max_seqlen_kv: int
    causal: bool  # aligned at the lower right


# (q [queries, heads, d], k and v [keys, kv heads, d], lengths) -> [queries, heads, d]
VarlenKernel = Callable[[Tensor, Tensor, Tensor, VarlenCall], Tensor]

_TORCH = "torch.nn.attention.varlen"


def runs_half_precision(dtype: torch.dtype) -> bool:
    """Whether the kernels compute in `dtype`."""
    return dtype in (torch.bfloat16, torch.float16)


def find_kernel(device: torch.device) -> VarlenKernel | None:
    """The best kernel for the GPU `device`; None where none is installed or the GPU is older than what they need."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if find_spec("flash_attn") is not None:
        return flash_attn
    if find_spec("transformer_engine") is not None:
        return transformer_engine
    if find_spec(_TORCH) is not None and torch.backends.cuda.is_flash_attention_available():
        return torch_varlen
    return None


def flash_attn(q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> Tensor:
    """flash-attn 2.1 or newer, which aligns a causal mask at the lower right."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        call.cu_seqlens_q,
        call.cu_seqlens_kv,
        call.max_seqlen_q,
        call.max_seqlen_kv,
        causal=call.causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def transformer_engine(q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> Tensor:
    """Transformer Engine's DotProductAttention on packed tokens; it chooses between its own backends."""
    attention = _transformer_engine_attention(q.shape[1], k.shape[1], q.shape[2])
    out = attention(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        qkv_format="thd",
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_kv=call.cu_seqlens_kv,
        max_seqlen_q=call.max_seqlen_q,
        max_seqlen_kv=call.max_seqlen_kv,
        attn_mask_type="padding_causal_bottom_right" if call.causal else "padding",
    )
    return out.view(q.shape)


@lru_cache
def _transformer_engine_attention(heads: int, kv_heads: int, head_dim: int) -> torch.nn.Module:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(heads, head_dim, num_gqa_groups=kv_heads, attention_dropout=0.0, qkv_format="thd")


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> Tensor:
    """torch's flash attention over packed tokens, torch 2.10 or newer."""
    from torch.nn.attention.varlen import varlen_attn

    accepted = inspect.signature(varlen_attn).parameters
    options = {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in accepted else {}
    if call.causal:  # newer versions say it by a window
        options |= {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}
    lengths = (call.cu_seqlens_q, call.cu_seqlens_kv, call.max_seqlen_q, call.max_seqlen_kv)
    return varlen_attn(q, k, v, *lengths, **options)
