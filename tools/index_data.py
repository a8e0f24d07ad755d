"""Writes a small index beside every data file: where rows lie, how long their texts, how large their pictures are.

    python tools/index_data.py data.yaml --tokenizer models/BAGEL-7B-MoT --processes 8
    python tools/index_data.py remote.yaml --out indexes        # then set index_dir: indexes in the group

With an index a run opens a large or remote file without reading it through, and measures pictures without opening them;
an index that is older than its file is not used. Files whose index is current are skipped, so a run that was stopped
goes on at the file it was at. A file's index is written when all its rows were looked at.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

from inspection.indexing import Job, describe_file, finish, is_current, list_jobs, open_pool  # noqa: E402
from tqdm import tqdm  # noqa: E402

from megabagel.config.datasets import load_dataset_groups  # noqa: E402
from megabagel.data.files import storage  # noqa: E402
from megabagel.data.files.index import RowFacts  # noqa: E402
from megabagel.data.text import Tokenizer  # noqa: E402

LISTED = 20  # bad rows of a file


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="data file (YAML)")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; without it texts are not counted")
    parser.add_argument("--out", help="local folder for the indexes (default: index_dir of the group, else beside)")
    parser.add_argument("--processes", type=int, default=1, help="processes that look at rows")
    options = parser.parse_args(arguments)
    try:
        fingerprint = Tokenizer(options.tokenizer).fingerprint if options.tokenizer else ""
        out = None if options.out is None else str(Path(options.out).resolve())
        jobs = list_jobs(load_dataset_groups(options.data), out)
        due = [job for job in jobs if not is_current(job, fingerprint)]
        print(f"{len(jobs)} files, {len(jobs) - len(due)} have a current index")
        with open_pool(options.processes) as pool, tqdm(total=0, unit=" rows", disable=None) as bar:
            for job in due:
                _index(job, options.tokenizer, fingerprint, pool, bar)
    except (ValueError, OSError) as error:  # ConfigError and DataError are ValueErrors
        print(f"index_data: {error}", file=sys.stderr)
        return 2
    return 0


def _index(job: Job, folder: str | None, fingerprint: str, pool, bar: tqdm) -> None:
    stamp = storage.stamp(job.path)
    source = job.open()
    bar.total += sum(source.blocks)
    bar.set_description(Path(job.path).name)
    rows: list[RowFacts] = []
    for chunk in describe_file(job, source, folder, pool):
        rows += chunk
        bar.update(len(chunk))
    finish(job, stamp, fingerprint, source, rows)
    bad = [*source.faults, *(row.fault for row in rows if row.fault is not None)]
    pictures, tokens = sum(len(row.sizes) for row in rows), sum(sum(row.tokens) for row in rows)
    tqdm.write(f"{job.path}: {len(rows):,} rows, {len(bad):,} bad, {pictures:,} pictures, {tokens:,} tokens of text")
    for fault in bad[:LISTED]:
        tqdm.write(f"  bad: {fault}")
    if len(bad) > LISTED:
        tqdm.write(f"  bad: {len(bad) - LISTED:,} more; tools/inspect_data.py lists all of them")


if __name__ == "__main__":
    sys.exit(main())
