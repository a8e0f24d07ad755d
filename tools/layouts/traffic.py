"""Counts the bytes that a rank sends through torch.distributed, by kind of collective, whoever calls it.

It listens below the Python wrappers, at the dispatcher, so nothing is counted twice and no caller has to be known.
"""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "p2p", "broadcast")


def _size(tensors: object) -> int:
    """Bytes of a tensor, or of all tensors of a list (of lists)."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_size(t) for t in tensors)


# kind and bytes that one rank sends in a group of n, by ring algorithms; all-to-all is left to `_to_others`
_SENT = {
    "allgather_": ("all-gather", lambda out, own, n: (n - 1) * _size(own)),
    "_allgather_base_": ("all-gather", lambda out, own, n: (n - 1) * _size(own)),
    "allgather_into_tensor_coalesced_": ("all-gather", lambda out, own, n: (n - 1) * _size(own)),
    "reduce_scatter_": ("reduce-scatter", lambda out, own, n: (n - 1) * _size(out)),
    "_reduce_scatter_base_": ("reduce-scatter", lambda out, own, n: (n - 1) * _size(out)),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", lambda out, own, n: (n - 1) * _size(out)),
    "allreduce_": ("all-reduce", lambda own, _, n: 2 * (n - 1) * _size(own) / n),
    "allreduce_coalesced_": ("all-reduce", lambda own, _, n: 2 * (n - 1) * _size(own) / n),
    "broadcast_": ("broadcast", lambda own, _, n: (n - 1) * _size(own) / n),
    "send": ("p2p", lambda own, _, n: _size(own)),
}
_SILENT = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_"}


def _to_others(name: str, arguments: tuple, group: dist.ProcessGroup) -> int:
    """Bytes of an all-to-all's input that leave this rank."""
    output, own = arguments[:2]
    if name == "alltoall_":
        return _size(own) - _size(own[group.rank()])
    splits = arguments[4] or [len(own) // group.size()] * group.size()
    return _size(own) - splits[group.rank()] * _size(own[:1])


class Traffic(TorchDispatchMode):
    """Inside a `with` block, adds up what this rank sends; `sent` maps a kind to bytes, `calls` to collectives.

    Convention: what a ring algorithm sends per rank. All-gather and reduce-scatter of N bytes over n ranks: N (n-1)/n;
    all-reduce: twice that; broadcast: N (n-1)/n on average; all-to-all: what is meant for others; p2p: the tensor.
    Groups of one rank send nothing. Raises NotImplementedError at a collective that is not in the table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        """Called for every operation of torch; only those of c10d matter here."""
        if function.namespace == "c10d":
            self._count(function.name().removeprefix("c10d::"), arguments)
        return function(*arguments, **(options or {}))

    def _count(self, name: str, arguments: tuple) -> None:
        if name in _SILENT:
            return
        group = next(_group(a) for a in arguments if isinstance(a, torch.ScriptObject))
        if name in ("alltoall_", "alltoall_base_"):
            kind, sent = "all-to-all", _to_others(name, arguments, group)
        elif name in _SENT:
            kind, formula = _SENT[name]
            sent = formula(arguments[0], arguments[1], group.size())
        else:
            raise NotImplementedError(f"c10d::{name} is not counted; allowed are {', '.join([*_SENT, *_SILENT])}")
        if group.size() > 1:
            self.sent[kind] += int(sent)
            self.calls[kind] += 1


def _group(script_object: torch.ScriptObject) -> dist.ProcessGroup:
    """The first of the boxed arguments of every collective is its group."""
    return dist.ProcessGroup.unbox(script_object)
