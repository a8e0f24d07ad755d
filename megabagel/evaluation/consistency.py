"""Does a model understand what it has drawn: its own captions of its pictures, and which prompt it thinks was drawn."""

from collections.abc import Sequence

from PIL import Image

from megabagel.evaluation.text_scores import rouge
from megabagel.inference import Generator, TextSettings
from megabagel.inference.likelihood import log_likelihoods
from megabagel.runtime import rng


def captions(generator: Generator, images: Sequence[Image.Image], question: str, max_tokens: int) -> list[str]:
    """What the model answers to `question` about each picture."""
    return generator.answers([[image, question] for image in images], TextSettings(max_tokens))


def agreement(caption: str, prompt: str) -> float:
    """ROUGE-L of a caption and the prompt that was drawn, 0 .. 1."""
    return rouge(caption, [prompt])["rougeL"]


def candidates(prompts: Sequence[str], number: int, distractors: int) -> list[str]:
    """The prompt of that number, then at most so many different ones of the others, always the same."""
    others = sorted(set(prompts) - {prompts[number]})
    order = rng.generator(0, "candidates", (number,)).permutation(len(others))
    return [prompts[number], *(others[place] for place in order[:distractors])]


def is_found(generator: Generator, image: Image.Image, texts: Sequence[str], question: str) -> bool:
    """Whether the picture makes the first of `texts` more likely, as an answer to `question`, than it does the others:
    by the ratio of probabilities with and without the picture, so that common texts have no advantage."""
    seen = log_likelihoods(generator, [image, question], texts)
    unseen = log_likelihoods(generator, [question], texts)
    gains = [with_picture - without for with_picture, without in zip(seen, unseen, strict=True)]
    return gains.index(max(gains)) == 0
