"""What the demo's model can do, for people: a contact sheet, a table in Markdown, and the same numbers as JSON.

It draws and writes; nothing is generated or scored here.
"""

from pathlib import Path

from megabagel.evaluation.contact_sheet import Cell, contact_sheet
from tools.demo.answers import Question
from tools.demo.formats import write_json
from tools.demo.pictures import Made, open_png

SHOWN_PROMPTS, SHOWN_EDITS, SHOWN_QUESTIONS, COLUMNS = 24, 8, 8, 8


def draw_sheet(
    prompts: Made, edits: Made, questions: list[Question], answers: list[str], pictures: Path, file: Path
) -> None:
    """One PNG: pictures made from names, edits as source, result and target, questions with their answers."""
    rows: list[list[Cell]] = [["From a name (these pictures were trained on; x: not taken for the right one)"]]
    notes: list[list[str]] = [[]]
    shown = _spread(len(prompts.images), SHOWN_PROMPTS)
    for start in range(0, len(shown), COLUMNS):
        part = shown[start : start + COLUMNS]
        rows.append([prompts.images[n] for n in part])
        notes.append([_marked(prompts.prompts[n], prompts.right[n]) for n in part])
    rows.append(["Edits of emojis never trained on: source, what the model made of it, what was meant"])
    notes.append([])
    shown = _spread(len(edits.images), SHOWN_EDITS)
    for start in range(0, len(shown), 2):
        row: list[Cell] = []
        note: list[str] = []
        for n in shown[start : start + 2]:
            row += [edits.sources[n], edits.images[n], edits.wanted[n], ""]
            note += [edits.prompts[n], "" if edits.right[n] else "x", "", ""]
        rows.append(row[:-1])
        notes.append(note[:-1])
    rows.append(["Questions about pictures never trained on, and the model's answers"])
    notes.append([])
    shown = _spread(len(questions), SHOWN_QUESTIONS)
    rows.append([open_png((pictures / questions[n].picture).read_bytes()) for n in shown])
    notes.append([_asked(questions[n], answers[n]) for n in shown])
    contact_sheet(rows, file, notes, side=98, text_size=11)


def _spread(count: int, wanted: int) -> list[int]:
    wanted = min(count, wanted)
    return [n * count // wanted for n in range(wanted)]


def _marked(text: str, right: bool) -> str:
    return text if right else f"{text} x"


def _asked(question: Question, answer: str) -> str:
    return f"{question.text}\n{answer}" if answer == question.answer else f"{question.text}\n{answer} x"


def markdown(results: dict) -> str:
    """A table of the scores with what one would reach without having learned anything, and how each was measured."""
    t2i, edit, vqa = results["t2i"], results["edit"], results["vqa"]
    rows = [
        ("emojis from their names", t2i["accuracy"], t2i["chance"], t2i["seconds"], t2i["how"]),
        ("edits of held-out emojis", edit["accuracy"], edit["chance"], edit["seconds"], edit["how"]),
    ]
    if tones := edit["of_tones"]:
        rows.append(("of these, of skin tones", tones["accuracy"], tones["chance"], edit["seconds"], edit["how"]))
    for kind, title in (("overall", "questions, all"), ("what", "questions, what"), ("yes_no", "questions, yes or no")):
        rows.append((title, vqa["accuracy"][kind], vqa["question_only"][kind], vqa["seconds"], vqa["how"]))
    lines = ["| score | model | baseline | seconds | how |", "|---|---|---|---|---|"]
    lines += [f"| {title} | {a:.1%} | {b:.1%} | {s:.0f} | {how} |" for title, a, b, s, how in rows]
    return "\n".join([f"After step {results['step']}, {results['weights']} weights.", "", *lines, ""])


def write(results: dict, folder: Path) -> None:
    """results.json and results.md."""
    write_json(results, folder / "results.json")
    (folder / "results.md").write_text(markdown(results), encoding="utf-8")


def summary(results: dict, folder: Path) -> str:
    """What the demo prints at its end."""
    t2i, edit, vqa = results["t2i"], results["edit"], results["vqa"]
    model, alone = vqa["accuracy"], vqa["question_only"]
    gain = model["yes_no"] - alone["yes_no"]
    tones = f" (of skin tones {edit['of_tones']['accuracy']:.1%})" if edit["of_tones"] else ""
    yes_no = f"yes/no {model['yes_no']:.1%} " + ("beats its prior" if gain > 0 else "does not beat its prior")
    return "\n".join(
        [
            f"T2I retrieval {t2i['accuracy']:6.1%}   of {t2i['count']} training prompts (memorisation); "
            f"chance {t2i['chance']:.1%}; {t2i['seconds']:.0f} s",
            f"edits         {edit['accuracy']:6.1%}   of {edit['count']} pictures of held-out edits{tones}; chance "
            f"{edit['chance']:.1%}; {edit['seconds']:.0f} s",
            f"easy-vqa      {model['overall']:6.1%}   of {vqa['count']} test questions, what {model['what']:.1%} "
            f"(from the question alone {alone['overall']:.1%}, what {alone['what']:.1%}); {yes_no} of "
            f"{alone['yes_no']:.1%}; {vqa['seconds']:.0f} s",
            f"pictures      {folder / 'contact_sheet.png'}",
            f"scores        {folder / 'results.md'}",
        ]
    )
