"""The scores by name: what each needs, what is measured of every item on any rank, and how that becomes numbers.

The arithmetic is in the files beside this one; a new score is a row of SCORES.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megabagel.data.images import decode
from megabagel.evaluation import (
    clip_scores,
    consistency,
    distribution_scores,
    pixel_scores,
    text_scores,
    vqa,
    yes_no,
)
from megabagel.evaluation.items import Item, pictures_in
from megabagel.evaluation.settings import Models, Task
from megabagel.evaluation.work import Work

Measured = tuple[Sequence[int], Sequence[Any]]  # numbers of items, and what was measured of each, or of all
ANSWERS, PICTURES, RECONSTRUCTIONS = ("answer",), ("picture",), ("reconstruction",)
BOTH = PICTURES + RECONSTRUCTIONS


@dataclass(frozen=True)
class Score:
    """`measure` is called on every rank, `total` with its result on rank 0 alone. It counts items of `kinds` only."""

    kinds: tuple[str, ...]
    total: Callable[[Work, Measured], dict[str, float]]
    measure: Callable[[Work], Measured] | None = None  # None: what was made
    model: str | None = None  # field of Models
    wants: str | None = None  # field of Item that none of these items may lack
    format: str | None = None  # of the task


def measured(work: Work, name: str) -> Measured:
    """What score `name` needs of the items; every rank calls it."""
    score = SCORES[name]
    if score.measure:
        return score.measure(work)
    numbers = [number for number, item in enumerate(work.items) if item.kind in score.kinds]
    return numbers, [work.made[work.items[number].id] for number in numbers]


def score_faults(task: Task, items: Sequence[Item], models: Models, where: str) -> Iterator[str]:
    """Why the task cannot have its scores, before anything is loaded."""
    for name in task.scores:
        if name not in SCORES:
            yield f"{where}: there is no score {name}; allowed are {', '.join(SCORES)}."
        score = SCORES[name]
        of_kind = [item for item in items if item.kind in score.kinds]
        if not of_kind:
            about = " and ".join(f"{kind}s" for kind in score.kinds)
            yield f"{where}: score {name} is about {about}, which {task.file} does not ask for."
        if score.format and task.format != score.format:
            yield f"{where}: score {name} needs format {score.format}, but the task's format is {task.format}."
        if score.model and getattr(models, score.model) is None:
            yield (
                f"{where}: score {name} needs files that do not come with megabagel; give --{score.model} PATH or "
                f"models.{score.model} in the settings, or remove the score."
            )
        for item in of_kind:
            if score.wants and not getattr(item, score.wants):
                yield f"{where}: score {name} needs `{score.wants}`, which entry {item.id} of {task.file} lacks."
        if name in ("fid", "kid") and (len(of_kind) < 2 or len(_real(task, of_kind)) < 2):
            yield (
                f"{where}: score {name} compares at least 2 pictures with at least 2 real ones; set `reference_dir` "
                "to a folder of those, or give every entry a `target`."
            )
        if name == "cider":
            text_scores.require_java()


def _texts(work: Work, data: Measured) -> tuple[list[str], list[Sequence[str]]]:
    """Answers and their references."""
    numbers, answers = data
    return list(answers), [work.items[number].references for number in numbers]


def _bleu(work: Work, data: Measured) -> dict[str, float]:
    return {"bleu": text_scores.bleu(*_texts(work, data))}


def _rouge(work: Work, data: Measured) -> dict[str, float]:
    each = [text_scores.rouge(answer, given) for answer, given in zip(*_texts(work, data), strict=True)]
    return {name: fmean(scores[name] for scores in each) for name in each[0]}


def _meteor(work: Work, data: Measured) -> dict[str, float]:
    reader = text_scores.wordnet(work.models.wordnet)
    pairs = zip(*_texts(work, data), strict=True)
    return {"meteor": fmean(text_scores.meteor(answer, given, reader) for answer, given in pairs)}


def _cider(work: Work, data: Measured) -> dict[str, float]:
    return {"cider": text_scores.cider(*_texts(work, data))[0]}


def _mean_over_answers(name: str, score: Callable[[str, Sequence[str]], float]):
    def total(work: Work, data: Measured) -> dict[str, float]:
        return {name: fmean(score(answer, given) for answer, given in zip(*_texts(work, data), strict=True))}

    return total


def _mme(work: Work, data: Measured) -> dict[str, float]:
    items = [work.items[number] for number in data[0]]
    labels, shown, tasks = zip(*((item.references[0], item.images[0], item.category) for item in items), strict=True)
    return yes_no.mme(data[1], labels, shown, tasks)


def _pope(work: Work, data: Measured) -> dict[str, float]:
    answers, labels = _texts(work, data)
    return yes_no.pope(answers, [given[0] for given in labels])


def _mean(name: str):
    """Of numbers that were measured."""

    def total(work: Work, data: Measured) -> dict[str, float]:
        return {name: fmean(map(float, data[1]))}

    return total


def _bert(work: Work) -> Measured:
    score = text_scores.BertScore(work.models.bert, work.task.bert_layer, work.device)

    def of(numbers: Sequence[int]) -> list[float]:
        return [score(work.made[work.items[n].id], work.items[n].references) for n in numbers]

    return work.measure(_settled("bertscore", work.stamp("bert"), work.task.bert_layer), ANSWERS, of)


def _settled(name: str, *values: object) -> str:
    """A folder's name for what was measured with these settings."""
    given = "-".join(str(value) for value in values if value is not None)
    return f"{name}-{given}" if given else name


def _against_target(name: str, make: Callable[[Work], Callable], model: str | None = None):
    """A number for each picture and its target."""

    def measure(work: Work) -> Measured:
        score = make(work)
        return work.measure(
            _settled(name, work.stamp(model) if model else None),
            BOTH,
            lambda numbers: [score(work.picture(n), decode(work.items[n].target)) for n in numbers],
        )

    return measure


def _real(task: Task, items: Sequence[Item]) -> list[str]:
    """Files of real pictures."""
    if task.reference_dir is not None:
        return [str(path) for path in pictures_in(Path(task.reference_dir))]
    return [item.target for item in items if item.target]


def _features(work: Work) -> Measured:
    """Of what was made, then of what is real."""
    network = distribution_scores.Inception(work.models.inception, work.device)
    name = _settled("inception", work.stamp("inception"))
    numbers, made = work.measure(name, BOTH, lambda ns: [network(work.picture(n)) for n in ns])
    files = _real(work.task, [work.items[number] for number in numbers])
    groups = [files[start : start + 64] for start in range(0, len(files), 64)]
    real = work.share.spread(
        work.folder, f"{name}-real", groups, lambda place: [network(decode(file)) for file in groups[place]]
    )
    return numbers, [distribution_scores.unpack(made), distribution_scores.unpack([real[file] for file in files])]


def _fid(work: Work, data: Measured) -> dict[str, float]:
    return {"fid": distribution_scores.fid(*data[1])}


def _kid(work: Work, data: Measured) -> dict[str, float]:
    mean, deviation = distribution_scores.kid(*data[1])
    return {"kid": mean, "kid_deviation": deviation}


def _candidates(work: Work) -> dict[int, list[str]]:
    """Of each picture's number."""
    numbers = [number for number, item in enumerate(work.items) if item.kind == "picture"]
    prompts = [work.items[number].text for number in numbers]
    return {
        number: consistency.candidates(prompts, place, work.task.distractors) for place, number in enumerate(numbers)
    }


def _clip(work: Work) -> Measured:
    """Cosines of each picture with its prompt and with distractors."""
    clip, texts = clip_scores.Clip(work.models.clip, work.device), _candidates(work)
    name = _settled("clip", work.stamp("clip"), work.task.distractors)
    return work.measure(name, PICTURES, lambda numbers: [clip.similarities(work.picture(n), texts[n]) for n in numbers])


def _clip_score(work: Work, data: Measured) -> dict[str, float]:
    return {"clip_score": fmean(clip_scores.clip_score(cosines[0]) for cosines in data[1])}


def _clip_retrieval(work: Work, data: Measured) -> dict[str, float]:
    return {"clip_retrieval": fmean(float(cosines.index(max(cosines)) == 0) for cosines in data[1])}


def _captions(work: Work) -> Measured:
    task = work.task
    return work.measure(
        "captions",
        PICTURES,
        lambda numbers: consistency.captions(
            work.generator, [work.picture(n) for n in numbers], task.caption_question, task.max_tokens
        ),
    )


def _consistency(work: Work, data: Measured) -> dict[str, float]:
    pairs = zip(*data, strict=True)
    return {"consistency": fmean(consistency.agreement(text, work.items[n].text) for n, text in pairs)}


def _retrieval(work: Work) -> Measured:
    texts, question = _candidates(work), work.task.caption_question
    return work.measure(
        _settled("retrieval", work.task.distractors),
        PICTURES,
        lambda numbers: [consistency.is_found(work.generator, work.picture(n), texts[n], question) for n in numbers],
    )


SCORES = {
    "bleu": Score(ANSWERS, _bleu, wants="references"),
    "rouge": Score(ANSWERS, _rouge, wants="references"),
    "meteor": Score(ANSWERS, _meteor, wants="references", model="wordnet"),
    "cider": Score(ANSWERS, _cider, wants="references"),
    "bertscore": Score(ANSWERS, _mean("bertscore"), _bert, wants="references", model="bert"),
    "vqa_accuracy": Score(ANSWERS, _mean_over_answers("vqa_accuracy", vqa.accuracy), wants="references"),
    "exact_match": Score(ANSWERS, _mean_over_answers("exact_match", vqa.exact_match), wants="references"),
    "mme": Score(ANSWERS, _mme, format="mme"),
    "pope": Score(ANSWERS, _pope, format="pope"),
    "psnr": Score(BOTH, _mean("psnr"), _against_target("psnr", lambda work: pixel_scores.psnr), wants="target"),
    "ssim": Score(BOTH, _mean("ssim"), _against_target("ssim", lambda work: pixel_scores.ssim), wants="target"),
    "lpips": Score(
        BOTH,
        _mean("lpips"),
        _against_target("lpips", lambda work: pixel_scores.Lpips(work.models.vgg, work.device), "vgg"),
        wants="target",
        model="vgg",
    ),
    "fid": Score(BOTH, _fid, _features, model="inception"),
    "kid": Score(BOTH, _kid, _features, model="inception"),
    "clip_score": Score(PICTURES, _clip_score, _clip, model="clip"),
    "clip_retrieval": Score(PICTURES, _clip_retrieval, _clip, model="clip"),
    "consistency": Score(PICTURES, _consistency, _captions),
    "retrieval": Score(PICTURES, _mean("retrieval"), _retrieval),
}
