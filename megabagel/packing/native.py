"""The compiled planner of csrc/planner: what it takes and gives as arrays, here as pieces and a PackPlan.

It decides nothing itself. `planner.py` and `binpack.py` choose between it and the same thing in Python.
"""

import importlib
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from megabagel.packing.geometry import Geometry, fractional_buckets
from megabagel.packing.plan import PackPlan
from megabagel.packing.splits import TEXT, VAE, VIT, Piece, PlannedSample

logger = logging.getLogger(__name__)

_NAME = "megabagel.ops._planner"
_NUM_FIELDS = 12  # of struct Piece in csrc/planner/plan.h


def _older_than_its_sources(path: Path) -> bool:
    """In a checkout only: an installed package has no sources beside it."""
    sources = (Path(__file__).parents[2] / "csrc" / "planner").glob("*.*")
    return any(source.stat().st_mtime > path.stat().st_mtime for source in sources)


def _load() -> ModuleType | None:
    """The compiled module, or None and one warning that says why and what it costs."""
    spec = find_spec(_NAME)
    if spec is None:
        problem = "is not built"
    elif _older_than_its_sources(Path(spec.origin)):
        problem = "is older than its sources"
    else:
        try:
            return importlib.import_module(_NAME)
        except ImportError as error:
            problem = f"could not be loaded ({error})"
    logger.warning(
        "The C++ planner %s, Python code does its work: same plans, but some 40 ms for a pack of 32k tokens instead "
        "of less than 1 ms. Build it with 'python csrc/build.py' (needs g++).",
        problem,
    )
    return None


PLANNER = _load()


def build_plan(
    samples: Sequence[PlannedSample], geometry: Geometry, tile: int, total_length: int | None = None
) -> PackPlan:
    """`planner.build_plan` in C++, without the GIL. The tensors lie on the memory that it has filled."""
    pieces = [piece for sample in samples for piece in sample.pieces]
    vae = [piece.image_key for piece in pieces if piece.kind == VAE]
    key_length = len(samples[0].key) + 1 if samples else 1
    sample_lens = np.array([sample.num_tokens for sample in samples], dtype=np.int64)
    table, buckets = _piece_table(pieces, geometry)
    special = geometry.special_tokens
    und_length, gen_length, arrays = PLANNER.build_plan(
        pieces=table,
        timesteps=np.array([piece.timestep for piece in pieces], dtype=np.float32),
        text_ids=_concatenate([piece.text_ids for piece in pieces if piece.kind == TEXT]),
        sample_lens=sample_lens,
        buckets=buckets,
        geometry=(
            *(special.bos, special.eos, special.start_of_image, special.end_of_image),
            *(geometry.vit_max_num_patch_per_side, geometry.max_latent_size),
        ),
        tile=tile,
        total_length=total_length,
    )
    return PackPlan(
        und_length=und_length,
        gen_length=gen_length,
        image_keys=torch.from_numpy(np.array(vae, dtype=np.int64).reshape(-1, key_length)),
        sample_lens=torch.from_numpy(sample_lens),
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
    )


def _piece_table(pieces: Sequence[Piece], geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """The pieces as int64 [P, fields], and the interpolated positions that they point into, int64 [N]."""
    tables = _PositionTables(geometry)
    values: list[int] = []
    for p in pieces:
        rows, columns = p.grid if p.grid is not None else (0, 0)
        label = p.special_token_label
        values += (p.kind, p.length, p.rope_start, p.starts_split, p.mode, p.loss, rows, columns)
        values += (tables.start(p.kind, rows), tables.start(p.kind, columns))
        values += (label is not None, 0 if label is None else label)
    return np.array(values, dtype=np.int64).reshape(-1, _NUM_FIELDS), _concatenate(tables.arrays)


class _PositionTables:
    """The bucket of each row or column of the pictures, where their positions are interpolated."""

    def __init__(self, geometry: Geometry):
        self.arrays: list[np.ndarray] = []
        self._interpolate = geometry.interpolate_pos
        self._sides = {VIT: geometry.vit_max_num_patch_per_side, VAE: geometry.max_latent_size}
        self._starts: dict[tuple[int, int], int] = {}
        self._length = 0

    def start(self, kind: int, count: int) -> int:
        """Where the buckets of `count` rows or columns begin; -1: row i has position i."""
        if not self._interpolate or kind == TEXT:
            return -1
        side = self._sides[kind]
        if (count, side) not in self._starts:
            self._starts[count, side] = self._length
            self.arrays.append(fractional_buckets(count, side))
            self._length += count
        return self._starts[count, side]


def _concatenate(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
