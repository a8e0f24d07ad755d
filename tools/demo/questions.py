"""Understanding samples: easy-vqa's pictures with its questions and answers as conversations, in official jsonl.

Its own splits are kept: `train` is trained on, `test` is held out.
The pictures are copied as they come, not drawn anew.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tools.demo.packages import package_folder

Pair = tuple[str, str]  # question and answer

YES_NO = ("yes", "no")
OPEN_TURNS = 2  # a picture has a shape and a colour


def vqa_pictures(split: str) -> Iterator[tuple[int, np.ndarray]]:
    """(image id, uint8 [64, 64, 3]) of easy-vqa, by id."""
    folder = package_folder("easy_vqa") / "data" / split / "images"
    for file in sorted(folder.glob("*.png"), key=lambda file: int(file.stem)):
        yield int(file.stem), np.asarray(Image.open(file).convert("RGB"))


def vqa_questions(split: str) -> dict[int, list[Pair]]:
    """Image id -> (question, answer) in the package's order, without repetitions."""
    file = package_folder("easy_vqa") / "data" / split / "questions.json"
    questions: dict[int, dict[str, str]] = {}
    for question, answer, image in json.loads(file.read_text(encoding="utf-8")):
        questions.setdefault(image, {})[question] = answer
    return {image: list(pairs.items()) for image, pairs in questions.items()}


def conversation(image: str, pairs: list[Pair]) -> dict:
    """One VLM sample: the picture stands before the first question."""
    turns = []
    for index, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": ("<image>" if index == 0 else "") + question})
        turns.append({"from": "gpt", "value": answer})
    return {"image": image, "conversations": turns}


def one_by_one(pairs: list[Pair], _: str) -> list[list[Pair]]:
    """Every question in a conversation of its own, without an earlier answer to copy."""
    return [[pair] for pair in pairs]


def by_what_they_teach(pairs: list[Pair], key: str) -> list[list[Pair]]:
    """Conversations of at most `OPEN_TURNS` open questions and one to be answered with yes or no, ordered by hash.

    No open question stands behind words that hold its answer, so each must be looked up in the picture. Yes and no come
    first in every second conversation, if that gives nothing away. The other three of four such questions are left out:
    they take most of the tokens, and most of their answers follow from the question alone."""
    order = sorted(pairs, key=lambda pair: hashlib.sha256(f"{key} {pair[0]}".encode()).hexdigest())
    closed = [pair for pair in order if pair[1] in YES_NO]
    conversations: list[list[Pair]] = []
    for pair in order:
        if pair[1] not in YES_NO:
            fitting = (c for c in conversations if len(c) < OPEN_TURNS and not reveals(c, pair[1]))
            turns = next(fitting, None)
            if turns is None:
                conversations.append([pair])
            else:
                turns.append(pair)
    for number, (turns, pair) in enumerate(zip(conversations, closed, strict=False)):
        leads = number % 2 == 0 and not any(reveals([pair], answer) for _, answer in turns)
        turns.insert(0 if leads else len(turns), pair)
    return conversations or [closed[: OPEN_TURNS + 1]]


def reveals(turns: list[Pair], answer: str) -> bool:
    """Whether the word `answer` is said in one of the turns."""
    return any(answer in f"{question} {reply}".replace("?", " ").split() for question, reply in turns)


def write_vlm(
    split: str, out: Path, name: str, images: int, deal: Callable[[list[Pair], str], list[list[Pair]]]
) -> list[dict]:
    """Official VLM jsonl of what `deal` makes of each picture's questions, and pictures below `out`/images; returns the
    samples."""
    questions = vqa_questions(split)
    chosen = sorted(image for image in questions)[:images]
    folder = out / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    source = package_folder("easy_vqa") / "data" / split / "images"
    samples = []
    for image in tqdm(chosen, desc=name, mininterval=1):
        shutil.copyfile(source / f"{image}.png", folder / f"{image}.png")
        for pairs in deal(questions[image], f"{split} {image}"):
            samples.append(conversation(f"{split}/{image}.png", pairs))
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return samples
