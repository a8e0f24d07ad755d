"""The folders of a run's checkpoints: which exist, which are whole, which is the newest. Content is not its business.

RUN_DIR/iter_0000100/...                      the checkpoint after step 100; it got this name when it was whole
RUN_DIR/iter_0000100/files.json               sizes and checksums of its files
RUN_DIR/iter_0000100/metrics.json             what `save` was told about the model's quality, for `retention`
RUN_DIR/iter_0000200.partial/                 a save that goes on, or one that was killed
RUN_DIR/iter_0000050.removed/                 a removal that goes on, or one that was killed
RUN_DIR/latest_checkpointed_iteration.txt     the step to continue from, written last
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from megabagel.checkpoint.errors import CheckpointError

LATEST = "latest_checkpointed_iteration.txt"
FILES = "files.json"
METRICS = "metrics.json"
_FOLDER = re.compile(r"iter_(\d{7,})")
_LEFTOVER = re.compile(r"iter_\d{7,}\.(partial|removed)")
_CHUNK = 4 << 20


class FileRecord(NamedTuple):
    """What the manifest knows of a file: bytes and zlib's CRC-32; older checkpoints have no checksums."""

    size: int
    crc32: int | None


def step_folder(run_dir: str | Path, step: int) -> Path:
    """Folder of the checkpoint after `step`, once it is whole."""
    return Path(run_dir) / f"iter_{step:07d}"


def partial_folder(run_dir: str | Path, step: int) -> Path:
    """Folder that the files of the checkpoint after `step` are written into, between `begin` and `finish`."""
    return Path(run_dir) / f"iter_{step:07d}.partial"


def begin(run_dir: str | Path, step: int, needed_bytes: int = 0) -> Path:
    """An empty `partial_folder` for `step`; what killed saves and removals left in the run folder is cleared away.

    A checkpoint of the same step stays in force until `finish`. Raises CheckpointError when the folder cannot be
    written, or when fewer than `needed_bytes` are free for it.
    """
    try:
        settle(run_dir)
        partial = partial_folder(run_dir, step)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint.run_dir {run_dir}: the checkpoint after step {step} cannot be written there "
            f"({error.strerror}: {error.filename}); make the folder writable or choose another one"
        ) from None
    if fault := shortage(run_dir, f"the checkpoint after step {step}", needed_bytes):
        partial.rmdir()
        raise CheckpointError(fault)
    return partial


def shortage(run_dir: str | Path, what: str, needed_bytes: int) -> str | None:
    """The sentence to stop with when fewer than `needed_bytes` are free where `run_dir` is or will be, for `what`."""
    path = Path(run_dir).absolute()
    free = shutil.disk_usage(next(there for there in (path, *path.parents) if there.exists())).free
    if free >= needed_bytes:
        return None
    return (
        f"checkpoint.run_dir {run_dir}: {what} needs {_size(needed_bytes)}, but only {_size(free)} are free on that "
        "disk; free space there (checkpoint.keep_last limits how many checkpoints stay) or choose another folder"
    )


def finish(
    run_dir: str | Path, step: int, files: Mapping[str, FileRecord], metrics: Mapping[str, float] | None = None
) -> Path:
    """Declare the checkpoint after `step` whole and the newest; returns its folder.

    `files`: all files that were written and synced below `partial_folder`, by relative name. `metrics`: what is known
    of the model's quality, by name.
    """
    partial, final = partial_folder(run_dir, step), step_folder(run_dir, step)
    text = json.dumps(dict(metrics or {}), indent=1)
    _write_atomically(partial / METRICS, text)
    files = {**files, METRICS: FileRecord(len(text.encode()), zlib.crc32(text.encode()))}
    manifest = {name: FileRecord(*record)._asdict() for name, record in sorted(files.items())}
    _write_atomically(partial / FILES, json.dumps(manifest, indent=1))
    replaced = _mark_removed(final) if final.exists() else None
    os.replace(partial, final)  # a kill just before this line is made good by `settle`
    sync(final.parent)
    _write_atomically(Path(run_dir) / LATEST, f"{step}\n")
    if replaced:
        shutil.rmtree(replaced)
    return final


def abandon(run_dir: str | Path, step: int) -> None:
    """Delete what a failed save has written, so that a full disk does not stay full."""
    shutil.rmtree(partial_folder(run_dir, step), ignore_errors=True)


def remove(run_dir: str | Path, step: int) -> None:
    """Delete the checkpoint after `step`. A kill on the way leaves no folder that looks like a checkpoint."""
    shutil.rmtree(_mark_removed(step_folder(run_dir, step)))


def settle(run_dir: str | Path) -> list[Path]:
    """Finish or clear away what kills have left; returns the folders that were deleted. Only for a run folder's owner.

    A save that was killed after its last file but before it got its name is completed where its place is free.
    """
    deleted = []
    for path in sorted(Path(run_dir).glob("iter_*")):
        if not _LEFTOVER.fullmatch(path.name):
            continue
        final = path.with_suffix("")
        if path.suffix == ".partial" and not final.exists() and damage(path) is None:
            os.replace(path, final)
        else:
            shutil.rmtree(path)
            deleted.append(path)
    return deleted


def records(folder: Path) -> dict[str, FileRecord]:
    """Size and checksum of every file below `folder`, read from the disk; the files are synced too."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    for path in paths:
        sync(path)
    return {str(p.relative_to(folder)): FileRecord(p.stat().st_size, _checksum(p)) for p in paths}


def manifest(folder: Path) -> dict[str, FileRecord]:
    """The files of a checkpoint by relative name, as `finish` wrote them down.

    Raises OSError or ValueError where there is no readable manifest.
    """
    entries = json.loads((folder / FILES).read_text())
    if not isinstance(entries, dict) or not entries:
        raise ValueError("no table of files")
    return {name: _record(name, entry) for name, entry in entries.items()}


def _record(name: str, entry: object) -> FileRecord:
    if isinstance(entry, int):  # as written before there were checksums
        return FileRecord(entry, None)
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), int) for key in FileRecord._fields):
        raise ValueError(f"no size and checksum of {name}")
    return FileRecord(entry["size"], entry["crc32"])


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, as the end of a sentence; None when every file has its full size."""
    try:
        files = manifest(folder)
    except FileNotFoundError:
        return f"was not finished: it has no {FILES}"
    except (OSError, ValueError) as error:
        return f"has an unreadable {FILES} ({error})"
    for name, record in files.items():
        try:
            found = (folder / name).stat().st_size
        except (OSError, ValueError):
            return f"lacks the file {name}"
        if found != record.size:
            return f"has a damaged file {name}: {found} bytes instead of {record.size}"
    return None


def share(folder: Path, rank: int, ranks: int) -> list[str]:
    """Files of an undamaged folder that `rank` of `ranks` checks in `verify`: about equally many bytes for each."""
    loads, mine = [0] * ranks, []
    for name, record in sorted(manifest(folder).items(), key=lambda item: -item[1].size):
        idle = loads.index(min(loads))
        loads[idle] += record.size
        if idle == rank:
            mine.append(name)
    return mine


def verify(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with the content of files (None: all), as the end of a sentence; None when checksums agree.

    Files of a manifest without checksums are passed over.
    """
    files = manifest(folder)
    for name in files if names is None else names:
        try:
            found = _checksum(folder / name)
        except OSError as error:
            return f"has an unreadable file {name} ({error.strerror})"
        if (wanted := files[name].crc32) is not None and found != wanted:
            return f"has a damaged file {name}: checksum {found:08x} instead of {wanted:08x}"
    return None


def metrics_of(folder: Path) -> dict[str, float]:
    """What `finish` was told of the model's quality; nothing where nothing readable is kept."""
    try:
        return {name: float(value) for name, value in json.loads((folder / METRICS).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def latest_step(run_dir: str | Path) -> int | None:
    """The step that the latest file names; None when there is no such file or it holds no number."""
    try:
        return int((Path(run_dir) / LATEST).read_text())
    except (OSError, ValueError):
        return None


def steps_to_try(run_dir: str | Path) -> list[int]:
    """Steps to continue from, best first: that of the latest file, then all older ones.

    Without a usable latest file: every folder, newest first. Folders newer than the latest file are not considered, so
    that editing the file goes back in time, and a kill before it was written leaves the old checkpoint in force.
    """
    found = (_FOLDER.fullmatch(p.name) for p in Path(run_dir).glob("iter_*") if p.is_dir())
    steps = sorted((int(match[1]) for match in found if match), reverse=True)
    latest = latest_step(run_dir)
    if latest is None:
        return steps
    return [latest, *(step for step in steps if step < latest)]


def _mark_removed(folder: Path) -> Path:
    marked = folder.with_name(folder.name + ".removed")
    if marked.exists():
        shutil.rmtree(marked)
    os.replace(folder, marked)
    sync(folder.parent)
    return marked


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _write_atomically(path: Path, text: str) -> None:
    """After a crash at any moment `path` holds the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file that was written, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
