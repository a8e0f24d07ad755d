"""Questions that are answered by yes or no: the scores of MME (Fu et al. 2023) and POPE (Li et al. 2023)."""

from collections import defaultdict
from collections.abc import Sequence

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_answer(text: str) -> str:
    """`yes`, `no` or `other`, by the first four letters, as MME's program reads it."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme(
    answers: Sequence[str], labels: Sequence[str], pictures: Sequence[str], subtasks: Sequence[str]
) -> dict[str, float]:
    """Per subtask the accuracy over questions, accuracy+ over pictures (all questions right) and their sum, all times
    100; sums over MME's perception and cognition subtasks where there are any."""
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for answer, label, picture, subtask in zip(answers, labels, pictures, subtasks, strict=True):
        right[subtask][picture].append(mme_answer(answer) == label.strip().lower())
    scores = {}
    for subtask, of_pictures in right.items():
        questions = [is_right for of in of_pictures.values() for is_right in of]
        scores[f"{subtask}/accuracy"] = 100 * sum(questions) / len(questions)
        scores[f"{subtask}/accuracy+"] = 100 * sum(map(all, of_pictures.values())) / len(of_pictures)
        scores[f"{subtask}/score"] = scores[f"{subtask}/accuracy"] + scores[f"{subtask}/accuracy+"]
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if found := [scores[f"{member}/score"] for member in members if member in right]:
            scores[name] = sum(found)
    return scores


def pope_answer(text: str) -> str:
    """`no` where the first sentence has the word no or not, else `yes`, as POPE's program reads it."""
    first = text.split(".")[0].replace(",", "").split()
    return "no" if any(word in ("No", "no", "not") for word in first) else "yes"


def pope(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of `yes`, and how often it was the answer; all 0 .. 1."""
    said = [pope_answer(answer) == "yes" for answer in answers]
    true = [label.strip().lower() == "yes" for label in labels]
    pairs = list(zip(said, true, strict=True))
    hits = sum(yes and is_true for yes, is_true in pairs)
    precision = hits / sum(said) if any(said) else 0.0
    recall = hits / sum(true) if any(true) else 0.0
    return {
        "accuracy": sum(yes == is_true for yes, is_true in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": sum(said) / len(said),
    }
