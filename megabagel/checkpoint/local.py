"""Fast checkpoints on the disks of the nodes: every rank keeps what it holds itself, for this layout and this run only.

LOCAL_DIR/RUN_ID/rank_00003/iter_0000100/...   as `folder` keeps them: sizes, checksums, names only when whole
RUN_DIR/run_id.txt                             tells the run from others, also from one that had this folder before

They are no replacement for those in the run folder: a node that goes takes its share with it.
"""

import logging
import pickle
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megabagel.checkpoint import folder
from megabagel.checkpoint.errors import CheckpointError, UnreadableError
from megabagel.checkpoint.file_record import recorded
from megabagel.checkpoint.pieces import Piece
from megabagel.checkpoint.torch_dist import load_object, load_tensor
from megabagel.checkpoint.torch_dist_writer import Item, PieceWriter

logger = logging.getLogger(__name__)

RUN_ID = "run_id.txt"
_CONTENTS = "contents.pt"
_KEPT = 2  # a kill while the newest is being written may leave ranks one step apart


class LocalStore:
    """The local checkpoints of this rank; every rank has one, and a rank's files are nobody else's business."""

    def __init__(self, local_dir: str | Path, run_id: str, rank: int, run_dir: str | Path | None = None):
        self.run_dir = run_dir
        self.path = Path(local_dir) / run_id / f"rank_{rank:05d}"
        self.rank = rank

    @classmethod
    def open(cls, local_dir: str | Path, run_dir: str | Path) -> "LocalStore":
        """The store of this rank in the run of `run_dir`; all ranks call it. Raises CheckpointError on all ranks."""
        found: list[str | CheckpointError | None] = [None]
        if dist.get_rank() == 0:
            try:
                found = [_run_id(Path(run_dir))]
            except OSError as error:
                found = [CheckpointError(f"checkpoint.run_dir {run_dir}: {RUN_ID} cannot be used ({error.strerror})")]
        dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], CheckpointError):
            raise found[0]
        return cls(local_dir, found[0], dist.get_rank(), run_dir)

    def steps(self) -> list[int]:
        """Steps of undamaged checkpoints by their sizes, newest first."""
        return [s for s in folder.steps_to_try(self.path) if folder.damage(folder.step_folder(self.path, s)) is None]

    def read(self, step: int) -> "LocalCheckpoint":
        """The checkpoint after `step`, its checksums compared. Raises UnreadableError."""
        source = folder.step_folder(self.path, step)
        try:
            fault = folder.damage(source) or folder.verify(source)
            if fault is None:
                return LocalCheckpoint(source, torch.load(source / _CONTENTS, weights_only=False))
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            fault = f"cannot be read ({error})"
        raise UnreadableError(f"local checkpoint {source} {fault}")

    def write(self, step: int, pieces: Sequence[Piece], objects: Mapping[str, object], run: dict[str, Any]) -> int:
        """Write a checkpoint and delete those that are too many; returns its bytes. Raises OSError, CheckpointError."""
        size = sum(piece.nbytes for piece in pieces)
        partial = folder.begin(self.path, step, size)
        try:
            written = PieceWriter(partial, self.rank).write(pieces, dict(objects))
            with recorded(partial / _CONTENTS) as file:
                torch.save({"items": written.items, "run": run}, file)
            folder.finish(self.path, step, {**written.files, _CONTENTS: file.record})
        except BaseException:
            folder.abandon(self.path, step)
            raise
        for number, old in enumerate(sorted(self._all_steps(), key=lambda s: (s > step, -s))):
            if number >= _KEPT or old > step:  # what is ahead belongs to a course that the run has left
                folder.remove(self.path, old)
        return size

    def _all_steps(self) -> list[int]:
        return [int(path.name.removeprefix("iter_")) for path in self.path.glob("iter_*") if path.suffix == ""]


@dataclass(frozen=True)
class LocalCheckpoint:
    """What a rank has kept of itself; read like `torch_dist.TorchDist`, but only the same pieces again."""

    source: Path
    contents: dict[str, Any]

    @property
    def run(self) -> dict[str, Any]:
        """What the run said of itself: step, counters, state of the data."""
        return self.contents["run"]

    def read_into(self, pieces: Iterable[Piece]) -> None:
        """Fill the data of `pieces`, which must be those that were written.

        Raises UnreadableError; nothing is filled when the pieces are others.
        """
        pieces, items = list(pieces), self._items()
        wanted = {(p.key, p.offsets): (p.global_shape, tuple(p.data.shape), p.stored_dtype) for p in pieces}
        stored = {at: (i.global_shape, i.lengths, i.dtype) for at, i in items.items() if i.dtype is not None}
        if wanted != stored:
            raise UnreadableError(f"local checkpoint {self.source} was written in another layout or by another model")
        places = {at: item.result.storage_data for at, item in items.items()}
        memory = bytearray(max((places[at].length for at in wanted), default=0))
        for piece in pieces:
            place = places[piece.key, piece.offsets]
            piece.data.copy_(load_tensor(self.source, piece.key, place, memory))

    def has_object(self, key: str) -> bool:
        return (key, ()) in self._items()

    def read_object(self, key: str) -> object:
        """An object that is no tensor. It is unpickled: trust the folder."""
        return load_object(self.source, key, self._items()[key, ()].result.storage_data)[0]

    def _items(self) -> dict[tuple[str, tuple[int, ...]], Item]:
        return {(item.key, tuple(item.result.index.offset or ())): item for item in self.contents["items"]}


@dataclass(frozen=True)
class LocalJob:
    """For `saver.Saver`: one local checkpoint of this rank."""

    store: LocalStore
    step: int
    pieces: Sequence[Piece]
    objects: dict[str, object]
    common: dict[str, Any]

    @property
    def run_dir(self) -> str | Path | None:
        """Of the run that it belongs to, if known."""
        return self.store.run_dir

    def write(self) -> int:
        """Bytes written; 0 and a warning when they could not be: other ranks are not asked, and the run goes on."""
        try:
            return self.store.write(self.step, self.pieces, self.objects, self.common)
        except (OSError, CheckpointError) as error:
            logger.warning(
                "rank %d: no local checkpoint after step %d (%s); the run goes on, and would resume from an older one",
                self.store.rank, self.step, error,
            )  # fmt: skip
            return 0


def common_steps(store: LocalStore, run_dir: str | Path) -> tuple[list[int], str | None]:
    """Steps, newest first, that all ranks have and that are newer than what `run_dir` holds; all ranks call it.

    Besides, what is to be said of newer ones that cannot be used. None can where somebody went back in time: where
    `run_dir` has checkpoints newer than its latest file says.
    """
    report = (store.steps(), _newest_shared(run_dir) if dist.get_rank() == 0 else None)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, report)
    shared, newest = of_ranks[0][1], max((steps[0] for steps, _ in of_ranks if steps), default=-1)
    if shared is None:
        return [], f"{run_dir} was set back to an older checkpoint: local ones are left out" if newest > -1 else None
    if newest <= shared:
        return [], None
    common = set.intersection(*(set(steps) for steps, _ in of_ranks))
    lacking = [rank for rank, (steps, _) in enumerate(of_ranks) if newest not in steps]
    note = f"rank {lacking[0]} has no whole local checkpoint after step {newest}, as others have" if lacking else None
    return sorted((step for step in common if step > shared), reverse=True), note


def _newest_shared(run_dir: str | Path) -> int | None:
    """Newest step of the run folder, -1 when it has none; None when its latest file has been set back."""
    steps = folder.steps_to_try(run_dir)
    present = [int(p.name.removeprefix("iter_")) for p in Path(run_dir).glob("iter_*") if p.suffix == ""]
    if steps and max(present, default=-1) > steps[0]:
        return None
    return steps[0] if steps else -1


def _run_id(run_dir: Path) -> str:
    """The run's name for itself, made up when it has none."""
    path = run_dir / RUN_ID
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex + "\n")
    return path.read_text().strip()
