"""What a task asks, item by item: rows of one's own, folders of pictures, and the prompt sets of others.

Each format is one small reader; answers in the forms of those prompt sets are written by `exports.py`.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megabagel.config.errors import ConfigError
from megabagel.config.requests import Request, located, read_entries
from megabagel.evaluation.settings import Task

Kind = Literal["answer", "picture", "reconstruction"]
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class Row(Request):
    """An entry of one's own file: a request, and what its result is compared with."""

    id: str | None = None  # a name of its own; null: its number in the file
    references: list[str] = field(default_factory=list)  # right answers or captions
    target: str | None = None  # picture that the result should be


@dataclass(frozen=True)
class Item:
    """`id` is unique in the task and a file's name. `text` is empty for a reconstruction, whose picture is `target`."""

    id: str
    kind: Kind
    text: str
    images: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    target: str | None = None
    category: str = ""  # MME's subtask
    height: int | None = None
    width: int | None = None
    seed: int = 0
    source: dict = field(default_factory=dict)  # what its prompt set's own program wants to have back


def read_items(task: Task, where: str) -> list[Item]:
    """All items of the task, in the order of its file; ids are unique. `where` opens messages. Raises ConfigError."""
    items = READERS[task.format](Path(task.file), task, where)[: task.limit]
    if not items:
        raise ConfigError(f"{where}: {task.file} holds nothing of format {task.format}.")
    several = task.samples_per_prompt > 1
    items = [
        replace(
            item,
            id=f"{item.id}_{sample:02d}" if several and item.kind == "picture" else item.id,
            height=item.height or task.height,
            width=item.width or task.width,
            text=item.text if item.kind == "picture" else task.template.replace("{}", item.text),
        )
        for item in items
        for sample in range(task.samples_per_prompt if item.kind == "picture" else 1)
    ]
    items = [replace(item, seed=task.seed + number) for number, item in enumerate(items)]
    seen: set[str] = set()
    for item in items:
        if item.id in seen or "/" in item.id or item.id.startswith("."):
            raise ConfigError(f"{where}: {task.file}: id {item.id} is there twice or is no file's name; change it.")
        seen.add(item.id)
    return items


def _rows(file: Path, task: Task, where: str) -> list[Item]:
    items = []
    for number, row in enumerate(read_entries(file, Row, where)):
        target = str(located(row.target, file, f"{where}: {file}, entry {number + 1}")) if row.target else None
        kind = "picture" if row.draws else "answer"
        items.append(
            Item(
                id=row.id or f"{number:05d}",
                kind=kind,
                text=row.text,
                images=tuple(row.images),
                references=tuple(row.references),
                target=target,
                height=row.height,
                width=row.width,
            )
        )
    return items


def pictures_in(folder: Path) -> list[Path]:
    """Picture files directly in `folder`, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)


def _pictures(folder: Path, task: Task, where: str) -> list[Item]:
    return [Item(path.name, "reconstruction", "", target=str(path)) for path in pictures_in(folder)]


def _geneval(file: Path, task: Task, where: str) -> list[Item]:
    """evaluation_metadata.jsonl: an object a line, with `prompt`."""
    items = []
    for number, line in enumerate(_lines(file, where)):
        if not isinstance(line.get("prompt"), str):
            raise ConfigError(f"{where}: {file}, line {number + 1} has no `prompt`; GenEval's metadata file has one.")
        items.append(Item(f"{number:05d}", "picture", line["prompt"], category=line.get("tag", ""), source=line))
    return items


def _dpg(folder: Path, task: Task, where: str) -> list[Item]:
    """DPG-Bench: a text file for each prompt."""
    files = sorted(folder.glob("*.txt"))
    return [Item(file.stem, "picture", " ".join(file.read_text(encoding="utf-8").split())) for file in files]


def _mme(folder: Path, task: Task, where: str) -> list[Item]:
    """MME: a folder for each subtask; beside each picture, or in questions_answers_YN, a text file of the same name
    with a question, a tab and yes or no in each line."""
    items = []
    for file in sorted([*folder.glob("*/*.txt"), *folder.glob("*/questions_answers_YN/*.txt")]):
        home = file.parent.parent if file.parent.name == "questions_answers_YN" else file.parent
        places = [place for place in (home / "images", home) if place.is_dir()]
        shown = [path for place in places for path in pictures_in(place) if path.stem == file.stem]
        if not shown:
            raise ConfigError(f"{where}: {file} has no picture of its name in {home}; fetch MME's pictures too.")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            question, tab, label = line.rpartition("\t")
            if not tab:
                raise ConfigError(f"{where}: {file}, line {number + 1} is no question, tab, answer.")
            source = {"picture": shown[0].name, "question": question, "label": label.strip()}
            name = f"{home.name}-{file.stem}-{number}"
            items.append(
                Item(name, "answer", question, (str(shown[0]),), (label.strip(),), category=home.name, source=source)
            )
    return items


def _pope(file: Path, task: Task, where: str) -> list[Item]:
    """POPE: an object a line, with `question_id`, `image`, `text` and `label`."""
    items = []
    for number, line in enumerate(_lines(file, where)):
        if missing := {"image", "text", "label"} - line.keys():
            raise ConfigError(f"{where}: {file}, line {number + 1} has no `{min(missing)}`; POPE's files have one.")
        image = Path(task.images_dir) / line["image"]
        if not image.is_file():
            raise ConfigError(f"{where}: {file}, line {number + 1}: there is no picture {image}; fix `images_dir`.")
        items.append(Item(f"{number:05d}", "answer", line["text"], (str(image),), (line["label"],), source=line))
    return items


READERS = {"rows": _rows, "pictures": _pictures, "geneval": _geneval, "dpg": _dpg, "mme": _mme, "pope": _pope}


def _lines(file: Path, where: str) -> list[dict]:
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: {file} is no file of JSON lines ({error}).") from None
    if not all(isinstance(line, dict) for line in lines):
        raise ConfigError(f"{where}: {file}: every line must be a JSON object.")
    return lines
