"""Counts bytes that a rank keeps: parameters, gradient buffers, optimizer state, moving average, saved activations.

Tensors that share memory count once. Not the allocator's view: no workspace, no fragments.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megabagel.training.ema import ShardedEma

_MLP = re.compile(r"\.(und|gen)\.mlp\.")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def parameter_bytes(chunks: Sequence[DistributedDataParallel]) -> tuple[int, int]:
    """All parameters of this rank, and those of the decoder's MLPs."""
    named = [item for chunk in chunks for item in chunk.module.named_parameters()]
    return _bytes(p for _, p in named), _bytes(p for name, p in named if _MLP.search(name))


def gradient_bytes(chunks: Sequence[DistributedDataParallel]) -> tuple[int, int]:
    """Gradient buffers of this rank (padding included), and the part of the decoder's MLPs (without padding)."""
    buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    named = [item for chunk in chunks for item in chunk.module.named_parameters()]
    mlp = _bytes(p.main_grad for name, p in named if p.requires_grad and _MLP.search(name))
    return _bytes(b.grad_data for b in buffers), mlp


def optimizer_bytes(optimizer: MegatronOptimizer, chunks: Sequence[DistributedDataParallel]) -> tuple[int, int]:
    """Main parameters and moments of this rank's shards, and those of the decoder's MLPs; call it after a step.

    Main parameters that are views of the model's own (fp32 training) cost nothing.
    """
    names = {p: name for chunk in chunks for name, p in chunk.module.named_parameters()}
    total = mlp = 0
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for parameter, (group, order) in part.model_param_group_index_map.items():
            main = part.optimizer.param_groups[group]["params"][order]
            own = main.dtype != parameter.dtype
            state = [t for t in part.optimizer.state[main].values() if torch.is_tensor(t)]
            size = _bytes([*state, *([main] if own else [])])
            total += size
            mlp += size if _MLP.search(names[parameter]) else 0
    return total, mlp


def average_bytes(ema: ShardedEma) -> int:
    """This rank's shards of the moving average."""
    return _bytes(ema.shards)


class _Kept:
    """A tensor that autograd keeps; says so when it is dropped."""

    def __init__(self, meter: "ActivationMeter", tensor: Tensor) -> None:
        self.meter, self.tensor = meter, tensor

    def __del__(self) -> None:
        self.meter.drop(self.tensor)


class ActivationMeter:
    """Inside a `with` block, follows the memory of what autograd saves for the backward pass; `peak` is its maximum.

    Parameters are left out, memory shared by several saved tensors counts once. What is computed again in the backward
    pass is saved then, and counted then.
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for stage in stages for p in stage.parameters()}
        self._holders: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: getattr(kept, "tensor", kept))
        self.now = self.peak = 0

    def __enter__(self) -> "ActivationMeter":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> "_Kept | Tensor":
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._parameters or not storage.nbytes():
            return tensor
        if not self._holders[storage.data_ptr()]:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self._holders[storage.data_ptr()] += 1
        return _Kept(self, tensor)

    def drop(self, tensor: Tensor) -> None:
        """One holder of the tensor's memory less."""
        storage = tensor.untyped_storage()
        self._holders[storage.data_ptr()] -= 1
        if not self._holders[storage.data_ptr()]:
            self.now -= storage.nbytes()
