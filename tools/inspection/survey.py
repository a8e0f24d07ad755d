"""Every row of a data file measured on the training path: token counts by kind, work, and what is wrong with others.

No picture is decoded. Rows come in the order of the first pass, so the numbers are those that a run meets.
"""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from megabagel.data.faults import Fault
from megabagel.data.loader import SampleMaker
from megabagel.packing.cost import CostModel
from megabagel.packing.plan import NOISE
from megabagel.packing.splits import TEXT, VIT, PlannedSample

KINDS = ("text", "vit", "vae", "noised")
COLUMNS = (*KINDS, "learnt", "pictures", "cost")
CHUNK = 64  # rows measured together


@dataclass
class GroupSurvey:
    """`table`: int64 [usable rows, COLUMNS], tokens with their frames. `file_faults`: found on opening."""

    name: str
    format: str
    rows: int  # in one pass
    table: np.ndarray = field(default_factory=lambda: np.zeros((0, len(COLUMNS)), dtype=np.int64))
    faults: list[Fault] = field(default_factory=list)
    file_faults: list[Fault] = field(default_factory=list)

    def column(self, name: str) -> np.ndarray:
        return self.table[:, COLUMNS.index(name)]

    @property
    def tokens(self) -> np.ndarray:
        return self.table[:, : len(KINDS)].sum(axis=1)

    @property
    def measured(self) -> int:
        return len(self.table) + len(self.faults)


def count(planned: PlannedSample, costs: CostModel) -> list[int]:
    """A row of the table."""
    values = Counter()
    for piece in planned.pieces:
        if piece.kind == TEXT:
            values["text"] += piece.length
            values["learnt"] += piece.length - 1 if piece.loss else 0
            continue
        kind = "vit" if piece.kind == VIT else "noised" if piece.mode == NOISE else "vae"
        values[kind] += piece.length
        values["pictures"] += 1
        values["learnt"] += piece.length - 2 if piece.loss and piece.kind != VIT else 0
        values["learnt"] += piece.special_token_label is not None
    values["cost"] = costs.cost(planned)
    return [values[name] for name in COLUMNS]


def survey(
    maker: SampleMaker,
    costs: CostModel,
    *,
    most_rows: int | None = None,
    processes: int = 1,
    progress: Callable[[int], object] = lambda rows: None,
) -> list[GroupSurvey]:
    """Measure the first `most_rows` rows of each group's order, or all. `progress` is told how many rows are done."""
    surveys = []
    for index, (name, group) in enumerate(maker.groups.items()):
        rows = maker.orders[index].num_rows
        found = GroupSurvey(name, group.format, rows, file_faults=list(maker.sources[index].faults))
        surveys.append(found)
    tables: list[list[list[int]]] = [[] for _ in surveys]
    for index, results in _measure(maker, costs, _chunks(surveys, most_rows), processes):
        for result in results:
            if isinstance(result, Fault):
                surveys[index].faults.append(result)
            else:
                tables[index].append(result)
        progress(len(results))
    for found, table in zip(surveys, tables, strict=True):
        found.table = np.array(table, dtype=np.int64).reshape(-1, len(COLUMNS))
    return surveys


def num_rows(maker: SampleMaker, most_rows: int | None) -> int:
    """How many rows `survey` measures."""
    return sum(_limited(order.num_rows, most_rows) for order in maker.orders)


def _limited(rows: int, most_rows: int | None) -> int:
    return rows if most_rows is None else min(rows, most_rows)


def _chunks(surveys: list[GroupSurvey], most_rows: int | None) -> list[tuple[int, int, int]]:
    """Group and its positions first .. last."""
    chunks = []
    for index, found in enumerate(surveys):
        last = _limited(found.rows, most_rows)
        chunks += [(index, first, min(first + CHUNK, last)) for first in range(0, last, CHUNK)]
    return chunks


def _measure(
    maker: SampleMaker, costs: CostModel, chunks: list[tuple[int, int, int]], processes: int
) -> Iterator[tuple[int, list[list[int] | Fault]]]:
    """Group and results of each chunk, in order."""
    _start(maker, costs)
    if processes == 1:
        for chunk in chunks:
            yield chunk[0], _measure_chunk(chunk)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megabagel.data.loader"])  # slow to import: once for all
    with ProcessPoolExecutor(processes, context, _start, (maker, costs)) as pool:
        for chunk, results in zip(chunks, pool.map(_measure_chunk, chunks), strict=True):
            yield chunk[0], results


_maker: SampleMaker  # of this process
_costs: CostModel


def _start(maker: SampleMaker, costs: CostModel) -> None:
    global _maker, _costs
    _maker, _costs = maker, costs


def _measure_chunk(chunk: tuple[int, int, int]) -> list[list[int] | Fault]:
    index, first, last = chunk
    results: list[list[int] | Fault] = []
    for position in range(first, last):
        planned = _maker.measure(index, position)
        results.append(planned if isinstance(planned, Fault) else count(planned, _costs))
    return results
