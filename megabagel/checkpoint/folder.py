"""The folders of a run's checkpoints: which exist, which are whole, which is the newest. Content is not its business.

RUN_DIR/iter_0000100/...                      the checkpoint after step 100
RUN_DIR/iter_0000100/files.json               names and sizes of its files, written when all of them are on disk
RUN_DIR/latest_checkpointed_iteration.txt     the step to continue from, written last
"""

import json
import os
import re
import shutil
from pathlib import Path

LATEST = "latest_checkpointed_iteration.txt"
FILES = "files.json"
_FOLDER = re.compile(r"iter_(\d{7,})")


def step_folder(run_dir: str | Path, step: int) -> Path:
    """Folder of the checkpoint after `step`."""
    return Path(run_dir) / f"iter_{step:07d}"


def begin(run_dir: str | Path, step: int) -> Path:
    """An empty folder for `step`; what a killed save left in the run folder is removed, this step's old one too."""
    remove_partial(run_dir)
    folder = step_folder(run_dir, step)
    if folder.exists():
        # first the mark, so that a kill during the removal leaves a folder that is known to be partial
        (folder / FILES).unlink(missing_ok=True)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def finish(run_dir: str | Path, step: int) -> None:
    """Declare the folder of `step` whole and the newest; every file of it must have been written by now."""
    folder = step_folder(run_dir, step)
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    for name in sizes:
        _sync(folder / name)
    _write_atomically(folder / FILES, json.dumps(sizes, indent=1))
    _write_atomically(Path(run_dir) / LATEST, f"{step}\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, as the end of a sentence; None when every file is there in full."""
    try:
        sizes = json.loads((folder / FILES).read_text())
    except FileNotFoundError:
        return f"was not finished: it has no {FILES}"
    except (OSError, ValueError) as error:
        return f"has an unreadable {FILES} ({error})"
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"lacks the file {name}"
        if found != size:
            return f"has a damaged file {name}: {found} bytes instead of {size}"
    return None


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
    steps = sorted((int(m[1]) for p in _folders(run_dir) if (m := _FOLDER.fullmatch(p.name))), reverse=True)
    latest = latest_step(run_dir)
    if latest is None:
        return steps
    return [latest, *(step for step in steps if step < latest)]


def remove_partial(run_dir: str | Path) -> list[Path]:
    """Delete the folders that a killed save left unfinished; returns them."""
    partial = [folder for folder in _folders(run_dir) if not (folder / FILES).exists()]
    for folder in partial:
        shutil.rmtree(folder)
    return partial


def _folders(run_dir: str | Path) -> list[Path]:
    return [p for p in Path(run_dir).glob("iter_*") if p.is_dir() and _FOLDER.fullmatch(p.name)]


def _write_atomically(path: Path, text: str) -> None:
    """After a crash at any moment `path` holds the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
