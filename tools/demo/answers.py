"""The score of understanding: questions about pictures that were never trained on, one at a time, answered greedily.

A picture is read once for all of its questions. The baseline beside the score knows the question and sees no picture.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from megabagel.inference import Generator, TextSettings
from megabagel.inference.conversation import Conversation
from megabagel.inference.text import decode
from tools.demo.questions import YES_NO

PICTURES_AT_ONCE = 40
_SETTINGS = TextSettings(max_tokens=4)


@dataclass(frozen=True)
class Question:
    """One question about a picture, its file counted from the folder of pictures."""

    picture: str
    text: str
    answer: str


def read_questions(file: Path) -> list[Question]:
    """Every question of a jsonl of conversations."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        turns = [turn["value"].removeprefix("<image>") for turn in sample["conversations"]]
        found += [Question(sample["image"], *pair) for pair in zip(turns[::2], turns[1::2], strict=True)]
    return found


def ask(bagel: Generator, questions: list[Question], pictures: Path) -> list[str]:
    """An answer to each question."""
    by_picture: dict[str, list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        by_picture[question.picture].append(number)
    answers = [""] * len(questions)
    names = list(by_picture)
    for start in range(0, len(names), PICTURES_AT_ONCE):
        together = names[start : start + PICTURES_AT_ONCE]
        shown = [(bagel.reader.open(0, draws=False), Image.open(pictures / name).convert("RGB")) for name in together]
        bagel.reader.show(shown)
        numbers = [n for name in together for n in by_picture[name]]
        asked = [
            Conversation(0, conversation.context.fork())
            for (conversation, _), name in zip(shown, together, strict=True)
            for _ in by_picture[name]
        ]
        bagel.reader.tell([(c, questions[n].text) for c, n in zip(asked, numbers, strict=True)])
        texts = decode(bagel.network, [c.context for c in asked], _SETTINGS, [0] * len(asked))
        for number, ids in zip(numbers, texts, strict=True):
            answers[number] = bagel.tokenizer.decode(ids).strip()
    return answers


def from_the_question_alone(trained: Iterable[Question], questions: list[Question]) -> list[str]:
    """The most frequent answer to the same question in training; to one never met, the most frequent of all."""
    trained = list(trained)
    counts: dict[str, Counter] = defaultdict(Counter)
    for question in trained:
        counts[question.text][question.answer] += 1
    usual = Counter(question.answer for question in trained).most_common(1)[0][0]
    return [counts[q.text].most_common(1)[0][0] if q.text in counts else usual for q in questions]


def accuracies(questions: list[Question], answers: list[str]) -> dict[str, float]:
    """Share of right answers: `overall`, to `what` questions, and to those that are answered with `yes_no`."""
    right: dict[str, list[bool]] = {"overall": [], "what": [], "yes_no": []}
    for question, answer in zip(questions, answers, strict=True):
        is_right = answer == question.answer
        right["overall"].append(is_right)
        right["yes_no" if question.answer in YES_NO else "what"].append(is_right)
    return {kind: sum(of) / len(of) for kind, of in right.items() if of}
