"""Rows of data files described for their indexes: token counts of texts, sizes of pictures from headers, what is wrong.

Some formats draw what a visit shows. Token counts are those of the first visit; pictures are collected over a few, and
one that none of them shows is simply opened when training meets it.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace

from megabagel.config.datasets import GroupConfig, is_url
from megabagel.data.document import Entry, lay_out
from megabagel.data.faults import DataError, DataFault, Fault
from megabagel.data.files import list_data_files, storage
from megabagel.data.files.index import Header, RowFacts, path_of, read_header, write_index
from megabagel.data.images import header_size
from megabagel.data.sources import Source
from megabagel.data.text import Tokenizer

CHUNK = 256  # rows described together
MAX_VISITS = 8
ENOUGH = 2  # visits in a row without a new picture


@dataclass(frozen=True)
class Job:
    """One data file, as a group that holds nothing else."""

    name: str  # of the group
    group: GroupConfig
    path: str
    index: str

    def open(self) -> Source:
        return Source(self.name, self.group, 0)


def list_jobs(groups: dict[str, GroupConfig], out: str | None) -> list[Job]:
    """A job for every file, in order; a file of several groups belongs to the first. `out`: folder of the indexes, in
    place of what the groups say. Raises DataError where there is no place for an index."""
    jobs: dict[str, Job] = {}
    for name, group in groups.items():
        folder = out or group.index_dir
        for dataset, paths in group.datasets.items():
            files, kind = list_data_files(dataset, paths, group.format, [])
            for path in files:
                if folder is None and is_url(path):
                    raise DataError(
                        f"{path} lies at a URL, beside which no index can be written; give a local folder with --out "
                        "and set index_dir of the group to it."
                    )
                jsonl = path if kind == ".jsonl" else None
                alone = {dataset: replace(paths, path=path, jsonl_path=jsonl, parquet_info_path=None)}
                only = replace(group, datasets=alone, dataset_names=[dataset], num_used_data=None, shuffle_lines=False)
                jobs.setdefault(path, Job(name, only, path, path_of(path, folder)))
    return list(jobs.values())


def is_current(job: Job, fingerprint: str) -> bool:
    """Whether the file's index was made of it as it is now, with the same tokenizer."""
    header = read_header(job.index)
    if header is None or (header.format, header.tokenizer) != (job.group.format, fingerprint):
        return False
    return header.stamp == storage.stamp(job.path)


def open_pool(processes: int) -> Executor | nullcontext:
    """Where rows are described; a null context stands for the calling process."""
    if processes == 1:
        return nullcontext()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megabagel.data.loader"])
    return ProcessPoolExecutor(processes, context)


def describe_file(job: Job, source: Source, folder: str | None, pool: Executor | None) -> Iterator[list[RowFacts]]:
    """Chunks of rows in order. `folder`: of the tokenizer; None: texts are not counted."""
    rows = sum(source.blocks)
    chunks = [(job, folder, first, min(first + CHUNK, rows)) for first in range(0, rows, CHUNK)]
    yield from pool.map(_describe_chunk, chunks) if pool is not None else map(_describe_chunk, chunks)


def finish(job: Job, stamp: tuple[int, str], fingerprint: str, source: Source, rows: list[RowFacts]) -> None:
    """Write the file's index. `stamp`: of the file before it was read."""
    faults = [[fault.kind, fault.origin, fault.message] for fault in source.faults]
    write_index(job.index, Header(stamp, job.group.format, fingerprint, faults), source.files[0].places(), rows)


def describe(source: Source, tokenizer: Tokenizer | None, row: int) -> RowFacts:
    """The row as it is now."""
    facts = RowFacts()
    sizes: dict[int, tuple[int, int]] = {}
    idle = 0
    try:
        for visit in range(MAX_VISITS):
            entries = source.document(row, (0, row, visit))
            if visit == 0:
                lay_out(entries)
                facts.tokens = _count(entries, tokenizer)
            new = [e.image for e in entries if e.image is not None and e.image.number not in sizes]
            for image in new:
                if image.number not in sizes:
                    sizes[image.number] = (0, 0)  # if what follows fails
                    sizes[image.number] = header_size(image.path if image.content is None else image.content)
            idle = 0 if new else idle + 1
            if idle == ENOUGH or not sizes:
                break
    except DataFault as fault:
        facts.fault = Fault(fault.kind, source.origin(row), str(fault))
    except MemoryError:
        raise
    except Exception as error:  # a row of an unforeseen shape, as in training
        facts.fault = Fault("bad_row", source.origin(row), f"{error!r}")
    facts.sizes = [sizes.get(number, (0, 0)) for number in range(max(sizes, default=-1) + 1)]
    return facts


def _count(entries: list[Entry], tokenizer: Tokenizer | None) -> list[int]:
    texts = [entry.text for entry in entries if entry.text is not None]
    return [] if tokenizer is None else [len(tokenizer.encode(text)) for text in texts]


_open: dict[str, Source] = {}  # the file at hand, in this process
_tokenizers: dict[str, Tokenizer] = {}


def _describe_chunk(chunk: tuple[Job, str | None, int, int]) -> list[RowFacts]:
    job, folder, first, last = chunk
    if job.path not in _open:
        _open.clear()
        _open[job.path] = job.open()
    if folder is not None and folder not in _tokenizers:
        _tokenizers[folder] = Tokenizer(folder)
    tokenizer = None if folder is None else _tokenizers[folder]
    return [describe(_open[job.path], tokenizer, row) for row in range(first, last)]
