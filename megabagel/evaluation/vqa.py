"""Short answers to questions: normalisation and soft accuracy of the VQA challenge (Antol et al. 2015), exact match.

The challenge's own program normalises only where people disagree; here, as in most later programs, always.
"""

import itertools
import re
from collections.abc import Sequence

_DIGITS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))
_DIGITS["none"] = "0"
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # one that starts no decimals
# only those that are no other word without their apostrophe, as it's, we'll, we're, he'll, she'll, let's would be
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _without_some_apostrophes(word: str) -> set[str]:
    pieces = word.split("'")
    marks = itertools.product(("", "'"), repeat=len(pieces) - 1)
    return {"".join(itertools.chain(*zip(pieces, (*mark, ""), strict=True))) for mark in marks} - {word}


_CONTRACTIONS = {short: word for word in _CONTRACTED for short in _without_some_apostrophes(word)}


def normalise(answer: str) -> str:
    """Lower case without punctuation and articles; numbers up to ten as digits, apostrophes put back."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _MARKS:
        stands_apart = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if stands_apart or has_number else " ")
    cleaned = _PERIOD.sub("", cleaned)
    found = [_DIGITS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in found if word not in _ARTICLES)


def accuracy(answer: str, given: Sequence[str]) -> float:
    """Agreement with people's answers: the mean, over leaving one of them out, of min(1, matches among the rest / 3).

    With a single answer there is nobody to leave out: 1 where it matches, else 0.
    """
    ours, theirs = normalise(answer), [normalise(text) for text in given]
    if len(theirs) == 1:
        return float(ours == theirs[0])
    matches = [text == ours for text in theirs]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def exact_match(answer: str, given: Sequence[str]) -> float:
    """1 where the normalised answer is one of the given ones, else 0."""
    return float(normalise(answer) in {normalise(text) for text in given})
