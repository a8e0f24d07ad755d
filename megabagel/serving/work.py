"""One answer or picture that a request asks for, and a batch of them done by one call of the generator.

Works travel to all ranks of the model, which run them alike; who asked, and whether they still listen, rank 0 knows.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from megabagel.data.images import decode
from megabagel.inference import FlowSettings, Generator, TextSettings
from megabagel.serving.team import Team

GOING, TEXT_OVER, DROPPED = range(3)  # what becomes of a work after a token or a step


@dataclass(frozen=True)
class Call:
    """What works must have in common to be done together."""

    kind: Literal["text", "picture", "text and picture"]
    temperature: float = 0.0
    top_p: float = 1.0
    think: bool = False
    flow: FlowSettings = FlowSettings()
    height: int | None = None  # of pictures; None: that of the last picture shown, else the largest
    width: int | None = None


@dataclass(frozen=True)
class Work:
    """Pictures are encoded files: small while they wait, decoded when their turn comes."""

    call: Call
    parts: tuple[str | bytes, ...]
    seed: int
    max_tokens: int
    max_pixels: int  # of a picture in `parts`


@dataclass(frozen=True)
class Made:
    """What a call gave for one work; the text of kind `text` went to `Listener.tokens` already."""

    text: str | None = None
    image: Image.Image | None = None


class Abandoned(Exception):
    """Nobody waits for any work of the batch any more."""


class Listener:
    """Hears of every token and step, and may end works. On ranks that have no clients it hears and says nothing."""

    def __init__(self, team: Team, works: Sequence[Work]):
        self.team, self.works = team, works

    def tokens(self, new: Sequence[int | None]) -> list[int]:
        """The new token of each work, None for those whose text has ended -> GOING, TEXT_OVER or DROPPED of each."""
        return [GOING] * len(self.works)

    def step(self, number: int) -> list[int]:
        """So many flow steps are done -> GOING or DROPPED of each work."""
        return [GOING] * len(self.works)

    def on_tokens(self, new: list[int | None]) -> Collection[int]:
        """For the generator: the works whose texts are over. Raises Abandoned."""
        return {n for n, state in enumerate(self._agreed(self.tokens(new))) if state != GOING}

    def on_step(self, number: int, *_: object) -> None:
        """For the generator. Raises Abandoned."""
        self._agreed(self.step(number + 1))

    def _agreed(self, states: list[int]) -> list[int]:
        states = self.team.agree(states)
        if all(state == DROPPED for state in states):
            raise Abandoned
        return states


def run(bagel: Generator, listener: Listener) -> list[Made]:
    """Do all works of `listener`; their calls are equal. Raises ConfigError, DataFault and Abandoned."""
    works = listener.works
    call = works[0].call
    prompts = [[p if isinstance(p, str) else decode(p, work.max_pixels) for p in work.parts] for work in works]
    writing = TextSettings(max(work.max_tokens for work in works), call.temperature, call.top_p)
    common = {"seeds": [work.seed for work in works], "on_tokens": listener.on_tokens}
    if call.kind == "text":
        bagel.answers(prompts, writing, think=call.think, **common)
        return [Made()] * len(works)
    common |= {"height": call.height, "width": call.width, "on_step": listener.on_step}
    if call.kind == "picture":
        drawn = bagel.pictures(prompts, call.flow, think=call.think, thinking=writing, **common)
        return [Made(one.thought, one.image) for one in drawn]
    turns = bagel.interleaved(prompts, ["text", "picture"], call.flow, writing, **common)
    return [Made(*parts) for parts in turns]
