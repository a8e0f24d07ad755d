"""Answers and pictures in the forms that the programs of other prompt sets read, in the folder `answers` of a task."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

from PIL import Image

from megabagel.data.images import decode
from megabagel.evaluation.items import Item
from megabagel.evaluation.work import Work


def export(work: Work) -> Path | None:
    """Write them on one rank; None for formats without a program of their own."""
    if work.task.format not in _WRITERS:
        return None
    folder = work.folder / "answers"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _WRITERS[work.task.format](work, folder)
    return folder


def _geneval(work: Work, folder: Path) -> None:
    """GenEval: 00000/metadata.jsonl and 00000/samples/00000.png, a folder for each prompt."""
    for number, samples in enumerate(_of_prompts(work)):
        home = folder / f"{number:05d}"
        (home / "samples").mkdir(parents=True)
        (home / "metadata.jsonl").write_text(json.dumps(samples[0].source) + "\n", encoding="utf-8")
        for place, item in enumerate(samples):
            shutil.copyfile(work.folder / work.made[item.id], home / "samples" / f"{place:05d}.png")


def _dpg(work: Work, folder: Path) -> None:
    """DPG-Bench: NAME.png for each prompt, its four pictures as two rows of two, or its only one."""
    for samples in _of_prompts(work):
        pictures = [decode(str(work.folder / work.made[item.id])) for item in samples]
        name = samples[0].id.rpartition("_")[0] if len(samples) > 1 else samples[0].id
        columns = max(1, round(len(pictures) ** 0.5))
        width, height = pictures[0].size
        sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
        for place, picture in enumerate(pictures):
            sheet.paste(picture, (place % columns * width, place // columns * height))
        sheet.save(folder / f"{name}.png")


def _mme(work: Work, folder: Path) -> None:
    """MME: SUBTASK.txt with picture, question, label and answer in each line, between tabs."""
    lines = defaultdict(list)
    for item in work.items:
        answer = " ".join(work.made[item.id].split())
        fields = item.source["picture"], item.source["question"], item.source["label"], answer
        lines[item.category].append("\t".join(fields) + "\n")
    for subtask, of_subtask in lines.items():
        (folder / f"{subtask}.txt").write_text("".join(of_subtask), encoding="utf-8")


def _pope(work: Work, folder: Path) -> None:
    """POPE: an object a line, in the order of its questions."""
    lines = [
        {"question_id": item.source.get("question_id"), "question": item.source["text"], "answer": work.made[item.id]}
        for item in work.items
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")


def _of_prompts(work: Work) -> list[list[Item]]:
    """The samples of each prompt."""
    size = work.task.samples_per_prompt
    return [work.items[start : start + size] for start in range(0, len(work.items), size)]


_WRITERS = {"geneval": _geneval, "dpg": _dpg, "mme": _mme, "pope": _pope}
