"""Work that is spread over the replicas of a model and remembered on disk, so that nothing is done twice.

What the work is, is the caller's matter; results are what JSON can hold.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm


@dataclass(frozen=True)
class Share:
    """This process's part: number `index` of `size` replicas; the first rank of a replica `writes`."""

    index: int
    size: int
    writes: bool

    def spread(
        self, folder: Path, name: str, groups: Sequence[Sequence[str]], work: Callable[[int], Sequence[object]]
    ) -> dict[str, object]:
        """The result of every id in `groups`, on every rank.

        `work` is given the number of a group and returns a result for each of its ids; a group with an unknown result
        is done by one replica. Groups do not depend on the number of ranks, so neither do results. Kept in
        FOLDER/NAME/rank_....jsonl. Every rank calls it alike.
        """
        home = folder / name
        known = [_read(home) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(known, src=0)
        (known,) = known
        todo = [number for number, ids in enumerate(groups) if any(key not in known for key in ids)]
        found: dict[str, object] = {}
        shown = dist.get_rank() == 0 and len(todo) > 0
        for number in tqdm(todo[self.index :: self.size], desc=f"{folder.name} {name}", disable=not shown):
            new = dict(zip(groups[number], work(number), strict=True))
            if self.writes:
                _append(home / f"rank_{dist.get_rank():04d}.jsonl", new)
            found |= new
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, found)
        for part in parts:
            known |= part
        return {key: known[key] for ids in groups for key in ids}


def _append(file: Path, results: dict[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": key, "result": result}, ensure_ascii=False) + "\n" for key, result in results.items()]
    with file.open("a", encoding="utf-8") as out:
        out.write("".join(lines))


def _read(home: Path) -> dict[str, object]:
    """Of all ranks; a line that a kill cut short is left out."""
    known = {}
    for file in sorted(home.glob("rank_*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            known[record["id"]] = record["result"]
    return known
