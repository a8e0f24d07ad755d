"""Whether a checkpoint is still what was written: every rank reads its share of the files, and all get one answer.

Which files there are is `folder`'s matter; whether their tensors fit the model is `distributed`'s.
"""

from pathlib import Path

import torch.distributed as dist

from megabagel.checkpoint import folder
from megabagel.checkpoint.errors import CheckpointError


def damage(source: Path, checksums: bool) -> str | None:
    """What is wrong with a checkpoint folder, as the end of a sentence; all ranks call it and get the same answer.

    Rank 0 looks at the names and sizes of all files; with `checksums` all files are read too, once in all.
    """
    outcome = [folder.damage(source) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None or not checksums:
        return outcome[0]
    faults = [None] * dist.get_world_size()
    dist.all_gather_object(faults, _damage_of_share(source))
    return next((fault for fault in faults if fault is not None), None)


def require(source: Path) -> None:
    """Raise CheckpointError on all ranks when a checkpoint folder is damaged; its content is compared too."""
    if fault := damage(source, checksums=True):
        raise CheckpointError(f"checkpoint {source} {fault}; copy it again or take another one")


def _damage_of_share(source: Path) -> str | None:
    try:
        return folder.verify(source, folder.share(source, dist.get_rank(), dist.get_world_size()))
    except (OSError, ValueError) as error:  # rank 0 could read it
        return f"has a {folder.FILES} that rank {dist.get_rank()} cannot read ({error})"
