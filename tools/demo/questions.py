"""Understanding samples: easy-vqa's pictures with its questions and answers as conversations, in official jsonl.

Its own splits are kept: `train` is trained on, `test` is held out.
The pictures are copied as they come, not drawn anew.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tools.demo.packages import package_folder

YES_NO = ("yes", "no")


def vqa_pictures(split: str) -> Iterator[tuple[int, np.ndarray]]:
    """(image id, uint8 [64, 64, 3]) of easy-vqa, by id."""
    folder = package_folder("easy_vqa") / "data" / split / "images"
    for file in sorted(folder.glob("*.png"), key=lambda file: int(file.stem)):
        yield int(file.stem), np.asarray(Image.open(file).convert("RGB"))


def vqa_questions(split: str) -> dict[int, list[tuple[str, str]]]:
    """Image id -> (question, answer) in the package's order, without repetitions."""
    file = package_folder("easy_vqa") / "data" / split / "questions.json"
    questions: dict[int, dict[str, str]] = {}
    for question, answer, image in json.loads(file.read_text(encoding="utf-8")):
        questions.setdefault(image, {})[question] = answer
    return {image: list(pairs.items()) for image, pairs in questions.items()}


def conversation(image: str, pairs: list[tuple[str, str]]) -> dict:
    """One VLM sample: the picture stands before the first question."""
    turns = []
    for index, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": ("<image>" if index == 0 else "") + question})
        turns.append({"from": "gpt", "value": answer})
    return {"image": image, "conversations": turns}


def deal(pairs: list[tuple[str, str]], size: int, key: str) -> list[list[tuple[str, str]]]:
    """The pairs shuffled by hash and dealt into even lists of about `size`, those that are not about yes or no first:
    behind yes and no to other questions their answers could be worked out without looking at the picture."""
    order = sorted(pairs, key=lambda pair: hashlib.sha256(f"{key} {pair[0]}".encode()).hexdigest())
    order.sort(key=lambda pair: pair[1] in YES_NO)
    parts = max(1, round(len(order) / size))
    return [order[index::parts] for index in range(parts)]


def write_vlm(split: str, out: Path, name: str, images: int, size: int) -> list[dict]:
    """Official VLM jsonl, and pictures below `out`/images; returns the samples."""
    questions = vqa_questions(split)
    chosen = sorted(image for image in questions)[:images]
    folder = out / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    source = package_folder("easy_vqa") / "data" / split / "images"
    samples = []
    for image in tqdm(chosen, desc=name, mininterval=1):
        shutil.copyfile(source / f"{image}.png", folder / f"{image}.png")
        for pairs in deal(questions[image], size, f"{split} {image}"):
            samples.append(conversation(f"{split}/{image}.png", pairs))
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return samples
