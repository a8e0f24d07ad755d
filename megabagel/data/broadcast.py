"""One reader per model replica: its packs go to the replica's other ranks, and so do its errors.

Needs a process group with a CPU backend. Pixels stay behind: `handout.py` sends each picture to whoever encodes it.
"""

import logging
import pickle
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megabagel.data.faults import DataError
from megabagel.data.handout import unseen
from megabagel.data.pack import Pack
from megabagel.data.reader import Reader
from megabagel.data.steps import EndOfData
from megabagel.packing.plan import PackPlan

logger = logging.getLogger(__name__)


class ReplicaReader:
    """The packs of a replica on each of its ranks. Every rank of the group makes the same calls in the same order."""

    def __init__(self, open_reader: Callable[[], Reader], group: dist.ProcessGroup, source_rank: int) -> None:
        """`open_reader` is called on global rank `source_rank` only. Raises DataError on all ranks when it fails
        there."""
        self._group, self._source = group, source_rank
        self._reader: Reader | None = None
        self._is_source = dist.get_rank() == source_rank

        def start() -> dict:
            self._reader = open_reader()
            return self._reader.state_dict()

        self._state = self._on_source(start)

    def next_step(self) -> list[Pack]:
        """This replica's packs of the next step; only the source has their pixels. Raises EndOfData on all ranks."""
        packs: list[Pack | None] = []

        def read() -> tuple[dict, int]:
            packs.extend(self._reader.next_step())
            return self._reader.state_dict(), len(packs)

        self._state, number = self._on_source(read)
        packs = packs or [None] * number
        return [broadcast_pack(pack, self._group, self._source) for pack in packs]

    def state_dict(self) -> dict:
        """The reader's state after the last step, on every rank."""
        return self._state

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state`, that of this replica. Raises DataError on all ranks when the reader refuses it."""

        def load() -> dict:
            self._reader.load_state_dict(state)
            return self._reader.state_dict()

        self._state = self._on_source(load)

    def close(self) -> None:
        """End the workers; not collective."""
        if self._reader is not None:
            self._reader.close()

    def _on_source(self, action: Callable[[], Any]) -> Any:
        return _agree(_attempt(action) if self._is_source else None, self._group, self._source)


def broadcast_pack(pack: Pack | None, group: dist.ProcessGroup | None, src: int) -> Pack:
    """Give every rank of `group` the pack of global rank `src`, and its pictures as shapes without content.

    The other ranks pass None.
    """
    if dist.get_world_size(group) == 1:
        return pack
    is_source = dist.get_rank() == src
    description = _broadcast_object(_describe(pack) if is_source else None, group, src)
    if is_source:
        return pack
    return Pack(
        plan=_unpack_plan(description.pop("plan")),
        vae_images=[unseen(*kind) for kind in description.pop("vae_kinds")],
        vit_images=[unseen(*kind) for kind in description.pop("vit_kinds")],
        **description,
    )


def _describe(pack: Pack) -> dict:
    """All of the pack but its pixels."""
    return {
        "vae_kinds": [(tuple(image.shape), image.dtype) for image in pack.vae_images],
        "vit_kinds": [(tuple(image.shape), image.dtype) for image in pack.vit_images],
        "groups": pack.groups,
        "keys": pack.keys,
        "origins": pack.origins,
        "plan": {
            f.name: value.numpy() if isinstance(value := getattr(pack.plan, f.name), Tensor) else value
            for f in fields(PackPlan)
        },
    }


def _unpack_plan(values: dict) -> PackPlan:
    return PackPlan(**{k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in values.items()})


def _broadcast_object(value: Any, group: dist.ProcessGroup | None, src: int) -> Any:
    """`value` of rank `src`, as one buffer of bytes behind its length."""
    is_source = dist.get_rank() == src
    data = np.frombuffer(pickle.dumps(value, protocol=5), np.uint8).copy() if is_source else np.empty(0, np.uint8)
    length = torch.tensor([data.size])
    dist.broadcast(length, src, group=group)
    buffer = torch.from_numpy(data) if is_source else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(buffer, src, group=group)
    return value if is_source else pickle.loads(buffer.numpy())


class _Failure(str):
    """The message of an exception on the reading rank."""


class _End(str):
    """There are no more data."""


def _attempt(action: Callable[[], Any]) -> Any:
    """The action's result, or its failure."""
    try:
        return action()
    except EndOfData as end:
        return _End(end)
    except Exception as error:
        if isinstance(error, DataError):  # its message is a sentence for the user
            return _Failure(error)
        logger.exception("the data reader failed")
        return _Failure(f"the data reader failed: {error!r}")


def _agree(outcome: Any, group: dist.ProcessGroup | None, src: int) -> Any:
    """The outcome of rank `src` on all ranks, raised as DataError or EndOfData if it is a failure or the end."""
    if dist.get_world_size(group) > 1:
        outcome = _broadcast_object(outcome, group, src)
    if isinstance(outcome, _Failure):
        raise DataError(str(outcome))
    if isinstance(outcome, _End):
        raise EndOfData(str(outcome))
    return outcome
