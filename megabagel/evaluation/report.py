"""What an evaluation found: results.json, a table in results.md, and a contact sheet of each task."""

import json
from collections.abc import Mapping
from pathlib import Path

from megabagel.data.images import decode
from megabagel.evaluation.contact_sheet import contact_sheet, in_columns
from megabagel.evaluation.work import Work

SHOWN = 48  # items of a task on its sheet
COLUMNS = 8


def write_results(out: Path, model: Mapping[str, object], tasks: Mapping[str, Mapping]) -> str:
    """results.json and results.md in `out`; returns the table. `tasks`: per name `items` and `scores`."""
    content = {"model": model, "tasks": tasks}
    _replace(out / "results.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    lines = ["| task | items | score | value |", "|---|---|---|---|"]
    for name, task in tasks.items():
        for score, value in task["scores"].items():
            lines.append(f"| {name} | {task['items']} | {score} | {value:.4f} |")
        if not task["scores"]:
            lines.append(f"| {name} | {task['items']} | collected only | |")
    table = "\n".join(lines) + "\n"
    title = f"# Evaluation of {model['folder']}\n\n"
    if model.get("step") is not None:
        title += f"Step {model['step']}, weights: {model['weights']}.\n\n"
    _replace(out / "results.md", title + table)
    return table


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_sheet(work: Work, path: Path) -> None:
    """The first items: what was shown, what was made, and what it should have been."""
    rows, captions = [], []
    for number, item in enumerate(work.items[:SHOWN]):
        shown = [decode(image) for image in item.images]
        notes = [""] * len(shown)
        made = work.made[item.id]
        if item.kind == "answer":
            expected = f"\n(right: {' | '.join(item.references[:3])})" if item.references else ""
            shown.append(f"{item.text}\n→ {made}{expected}")
            notes.append("")
        else:
            shown.append(work.picture(number))
            notes.append(item.text or "reconstruction")
        if item.target:
            shown.append(decode(item.target))
            notes.append("as it should be")
        rows.append(shown)
        captions.append(notes)
    rows, captions = in_columns(rows, captions, COLUMNS)
    contact_sheet(rows, path, captions)
