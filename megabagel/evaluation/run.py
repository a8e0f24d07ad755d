"""An evaluation from settings to reports, on every rank alike: each replica of the model does its share.

What was done with the same model and the same requests is kept; another model or other requests need another folder.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist

from megabagel.config.errors import ConfigError
from megabagel.evaluation.exports import export
from megabagel.evaluation.items import Item, read_items
from megabagel.evaluation.report import write_results, write_sheet
from megabagel.evaluation.scores import SCORES, measured, score_faults
from megabagel.evaluation.settings import Settings, Task
from megabagel.evaluation.share import Share
from megabagel.evaluation.work import Work
from megabagel.inference import Generator

IDENTITY_FILE = "identity.json"
_OTHER = {"model": "another model", "task": "other settings", "requests": "other requests"}
# what answers do not depend on, or only by way of the requests
_OF_SCORES = ("file", "scores", "limit", "template", "reference_dir", "distractors", "bert_layer")


def read_tasks(settings: Settings) -> dict[str, list[Item]]:
    """The items of every task, checked against its scores before anything is loaded. Raises ConfigError."""
    items = {}
    for name, task in settings.tasks.items():
        where = f"task {name}"
        items[name] = read_items(task, where)
        for fault in score_faults(task, items[name], settings.models, where):
            raise ConfigError(fault)
    return items


def model_faults(generator: Generator, items: dict[str, list[Item]], settings: Settings) -> None:
    """Raise ConfigError where the model cannot do what a task asks."""
    sees = generator.network.stage.vision is not None
    for name, of_task in items.items():
        for item in of_task:
            if item.kind != "answer" and generator.autoencoder is None:
                raise ConfigError(f"task {name} wants pictures, but this model makes none; remove the task.")
            if item.kind == "answer" and item.images and not sees:
                raise ConfigError(f"task {name} shows pictures, but this model sees none; remove the task.")
        if {"consistency", "retrieval"} & set(settings.tasks[name].scores) and not sees:
            raise ConfigError(f"task {name}: scores consistency and retrieval need a model that sees pictures.")


def run(
    settings: Settings,
    items: dict[str, list[Item]],
    generator: Generator,
    share: Share,
    out: Path,
    model: dict[str, object],
) -> str | None:
    """Evaluate; the table of results on rank 0, None elsewhere. `model`: what the results are said to be of."""
    results = {}
    for name, task in settings.tasks.items():
        work = Work(task, items[name], settings.models, generator, share, out / name)
        _claim(work.folder, identity(task, items[name], model))
        work.make()
        scores = {}
        for score in task.scores:
            data = measured(work, score)
            if dist.get_rank() == 0:
                scores |= SCORES[score].total(work, data)
        if dist.get_rank() == 0:
            export(work)
            write_sheet(work, out / f"{name}.png")
        results[name] = {"items": len(work.items), "scores": scores, "settings": asdict(task)}
    return write_results(out, model, results) if dist.get_rank() == 0 else None


def identity(task: Task, items: list[Item], model: dict[str, object]) -> dict[str, object]:
    """What answers and pictures depend on."""
    pictures = sorted({path for item in items for path in (*item.images, item.target) if path})
    stamps = [(path, Path(path).stat().st_size) for path in pictures]
    requests = [replace(item, references=(), source={}) for item in items]
    text = json.dumps([[asdict(item) for item in requests], stamps], sort_keys=True, ensure_ascii=False)
    asked = {key: value for key, value in asdict(task).items() if key not in _OF_SCORES}
    return {"model": model, "task": asked, "requests": hashlib.sha256(text.encode()).hexdigest()}


def _claim(folder: Path, wanted: dict[str, object]) -> None:
    """Note what the results in `folder` are of. Raises ConfigError, on every rank, where they are of something else."""
    verdict = [None]
    if dist.get_rank() == 0:
        file = folder / IDENTITY_FILE
        wanted = json.loads(json.dumps(wanted))
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if known is None:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        elif known != wanted:
            part = next(key for key in wanted if known.get(key) != wanted[key])
            verdict = [f"{folder} holds results of {_OTHER[part]}; give another --out, or delete that folder."]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0]:
        raise ConfigError(verdict[0])
