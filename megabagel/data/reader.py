"""The reader of one data-parallel rank: an endless stream of packs whose state is a few integers.

Files, order, mixture, workers and packing meet here. Sending packs to the other ranks of a replica is `broadcast.py`.
"""

import copy
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megabagel.config.datasets import GroupConfig
from megabagel.config.schema import DataConfig
from megabagel.data.faults import DataError, Fault, FaultLog
from megabagel.data.loader import SampleLoader, SampleMaker
from megabagel.data.mixture import Mixture
from megabagel.data.pack import Pack
from megabagel.data.text import Tokenizer
from megabagel.packing.binpack import BinPacker, PackLimits
from megabagel.packing.geometry import Geometry
from megabagel.packing.planner import build_plan
from megabagel.packing.splits import PlannedSample


@dataclass
class _Entry:
    group_index: int
    position: int
    sample: PlannedSample

    @property
    def num_tokens(self) -> int:
        return self.sample.num_tokens


class Reader:
    """Iterates over packs. Close it, or use it in a `with` block, to end its workers."""

    def __init__(
        self,
        config: DataConfig,
        groups: dict[str, GroupConfig],
        tokenizer: Tokenizer,
        geometry: Geometry,
        *,
        tile: int,
        total_length: int | None = None,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
    ) -> None:
        """`tile` and `total_length`: see `planner.build_plan`. Raises DataError when a group cannot be read at all and
        ValueError when token budgets contradict each other."""
        limits = PackLimits(
            config.expected_num_tokens,
            config.max_num_tokens,
            config.max_num_tokens_per_sample,
            config.prefer_buffer_before,
            config.max_buffer_size,
        )
        dropout = {
            "text": config.text_cond_dropout_prob,
            "vit_image": config.vit_cond_dropout_prob,
            "vae_image": config.vae_cond_dropout_prob,
        }
        self._geometry, self._tile, self._total_length = geometry, tile, total_length
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._names = list(groups)
        mixture = Mixture({name: g.weight for name, g in groups.items()}, config.seed, data_parallel_rank)
        mandatory = [i for i, g in enumerate(groups.values()) if g.is_mandatory]
        maker = SampleMaker(groups, tokenizer, geometry, dropout, config.seed)
        self._num_rows = [order.num_rows for order in maker.orders]
        self._faults = FaultLog({n: -(-r // self._size) for n, r in zip(self._names, self._num_rows, strict=True)})
        for name, source in zip(self._names, maker.sources, strict=True):
            for fault in source.faults:
                self._faults.file_fault(name, fault, say=data_parallel_rank == 0)
        self._loader = SampleLoader(maker, config.num_workers, self._rank, self._size)
        self._packer = BinPacker(limits, mandatory, mixture.group, self._next_entry, config.packing)
        self._packs_ahead = config.num_workers * config.prefetch_factor
        self._thread = ThreadPoolExecutor(1, "packing") if self._packs_ahead else None
        self._waiting: deque[Future] = deque()
        self._state = self._snapshot()

    def __iter__(self) -> "Reader":
        return self

    def __next__(self) -> Pack:
        """The next pack; there is no end. Raises DataError when a group turns out to have no usable row."""
        if self._thread is None:
            pack, self._state = self._build()
            return pack
        while len(self._waiting) < self._packs_ahead:
            self._waiting.append(self._thread.submit(self._build))
        pack, self._state = self._waiting.popleft().result()
        return pack

    def state_dict(self) -> dict:
        """State after the last pack that was handed out, whatever was read ahead. Integers, strings, lists, dicts."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict) -> None:
        """Continue after the pack that `state` was taken at.

        Raises DataError when the state belongs to other data or another data-parallel layout.
        """
        here = self._snapshot()
        for field, hint in (
            ("data_parallel", "resume with the same number of data-parallel ranks"),
            ("groups", "resume with the same groups in the same order"),
            ("num_rows", "resume with the same files"),
        ):
            if state[field] != here[field]:
                raise DataError(
                    f"the saved data state has {field} {state[field]}, this run has {here[field]}; {hint}, "
                    "or start a new run from the checkpoint's weights."
                )
        self._discard_waiting()
        self._loader.seek(state["counts"])
        packer = self._packer
        packer.num_draws, packer.num_mandatory_done = state["num_draws"], state["num_mandatory_done"]
        packer.open, packer.buffer = self._reload(state["open"]), self._reload(state["buffer"])
        self._faults.load_state_dict(state["faults"])
        self._state = copy.deepcopy(state)

    def fault_counts(self) -> dict[str, dict[str, int]]:
        """Skipped rows and files up to the last pack handed out: group -> kind -> number."""
        return copy.deepcopy(self._state["faults"]["num_bad"])

    def close(self) -> None:
        self._discard_waiting()
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._loader.close()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _discard_waiting(self) -> None:
        """Drop packs that were read ahead and wait until the packing thread rests."""
        while self._waiting:
            future = self._waiting.pop()
            if not future.cancel():
                future.exception()

    def _build(self) -> tuple[Pack, dict]:
        entries = self._packer.next_pack()
        samples = [entry.sample for entry in entries]
        pack = Pack(
            plan=build_plan(samples, self._geometry, self._tile, self._total_length),
            vae_images=[_channels_first(pixels) for sample in samples for pixels in sample.vae_pixels],
            vit_images=[_channels_first(pixels) for sample in samples for pixels in sample.vit_pixels],
            groups=[sample.group for sample in samples],
            keys=[sample.key for sample in samples],
            origins=[sample.origin for sample in samples],
        )
        return pack, self._snapshot()

    def _next_entry(self, group_index: int) -> _Entry:
        """The group's next usable sample."""
        name, most = self._names[group_index], self._packer.limits.max_num_tokens_per_sample
        while True:
            position, sample = self._loader.next(group_index)
            if not isinstance(sample, Fault) and sample.num_tokens > most:
                message = f"{sample.num_tokens} tokens, more than data.max_num_tokens_per_sample = {most}"
                sample = Fault("over_long", sample.origin, message)
            if isinstance(sample, Fault):
                self._faults.bad(name, sample)
                continue
            self._faults.good(name)
            return _Entry(group_index, position, sample)

    def _reload(self, references: list[list[int]]) -> list[_Entry]:
        """Read samples that were already drawn again."""
        entries = []
        for (group, position), sample in zip(references, self._loader.load(references), strict=True):
            if isinstance(sample, Fault):
                raise DataError(f"a sample that waited when the state was saved can no longer be read: {sample}")
            entries.append(_Entry(group, position, sample))
        return entries

    def _snapshot(self) -> dict:
        packer = self._packer
        return {
            "data_parallel": [self._rank, self._size],
            "groups": list(self._names),
            "num_rows": list(self._num_rows),
            "counts": list(self._loader.counts),
            "num_draws": packer.num_draws,
            "num_mandatory_done": packer.num_mandatory_done,
            "open": [[entry.group_index, entry.position] for entry in packer.open],
            "buffer": [[entry.group_index, entry.position] for entry in packer.buffer],
            "faults": self._faults.state_dict(),
        }


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
