"""The one thread that uses the model: takes batches from the queue and tells every client what it made. Other ranks of
the model follow it."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from megabagel.config.errors import ConfigError
from megabagel.data.faults import DataFault
from megabagel.inference import Generator
from megabagel.serving.limits import ApiError
from megabagel.serving.team import Team
from megabagel.serving.texts import TextStream
from megabagel.serving.waiting import Job, Waiting
from megabagel.serving.work import DROPPED, GOING, TEXT_OVER, Abandoned, Listener, run

logger = logging.getLogger(__name__)
IDLE_SECONDS = 60.0  # then rank 0 says that it lives, long before the others' collectives time out


@dataclass(frozen=True)
class Delta:
    """A piece of text."""

    text: str


@dataclass(frozen=True)
class Step:
    """So many flow steps are done."""

    number: int


@dataclass(frozen=True)
class Done:
    """The end of a job."""

    finish: str  # "stop" or "length"
    tokens: int  # of text
    text: str | None  # of a picture's thought; a text was sent piece by piece
    image: Image.Image | None


class Reporter(Listener):
    """Rank 0's: tells the clients."""

    def __init__(self, team: Team, jobs: Sequence[Job], tokenizer):
        super().__init__(team, [job.work for job in jobs])
        self.jobs = jobs
        self.texts = [TextStream(tokenizer, job.stops) for job in jobs]
        self.finish: list[str | None] = [None] * len(jobs)  # how each text ended

    def tokens(self, new: Sequence[int | None]) -> list[int]:
        return [self._token(n, token) for n, token in enumerate(new)]

    def _token(self, n: int, token: int | None) -> int:
        job, text = self.jobs[n], self.texts[n]
        if job.dropped:
            return DROPPED
        if self.finish[n] is not None:
            return TEXT_OVER
        if token is None:
            self._end(n, "stop")
            return TEXT_OVER
        self._say(n, text.push(token))
        if text.stopped or text.tokens >= job.work.max_tokens:
            self._end(n, "length")
            return TEXT_OVER
        return GOING

    def _say(self, n: int, delta: str) -> None:
        if delta:
            self.jobs[n].send(Delta(delta))

    def _end(self, n: int, finish: str) -> None:
        self._say(n, self.texts[n].close())
        self.finish[n] = "stop" if self.texts[n].stopped else finish
        if self.works[n].call.kind == "text":
            self.jobs[n].send(Done(self.finish[n], self.texts[n].tokens, None, None))

    def step(self, number: int) -> list[int]:
        for job in self.jobs:
            job.send(Step(number))
        return [DROPPED if job.dropped else GOING for job in self.jobs]


class Worker(threading.Thread):
    """`on_death` is called when the model cannot be used any more; `failure` then says why."""

    def __init__(self, bagel: Generator, waiting: Waiting, on_death: Callable[[], None] = lambda: None):
        super().__init__(name="model", daemon=True)
        self.bagel, self.waiting, self.on_death = bagel, waiting, on_death
        self.team = Team(bagel.network.device)
        self.running = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Until the queue is closed."""
        try:
            if self.team.device.type == "cuda":
                torch.cuda.set_device(self.team.device)  # every thread has its own
            while (jobs := self.waiting.take(IDLE_SECONDS)) is not None:
                self.team.tell([job.work for job in jobs])
                if jobs:
                    self._do(jobs)
            self.team.tell(None)
        except BaseException as error:
            self.failure = error
            self.waiting.close()
            self.on_death()

    def _do(self, jobs: list[Job]) -> None:
        began, self.running = time.monotonic(), len(jobs)
        reporter = Reporter(self.team, jobs, self.bagel.tokenizer)
        try:
            made = run(self.bagel, reporter)
            for n, (job, one) in enumerate(zip(jobs, made, strict=True)):
                if job.work.call.kind != "text":
                    job.send(Done(reporter.finish[n] or "stop", reporter.texts[n].tokens, one.text, one.image))
        except Abandoned:
            pass
        except (ConfigError, DataFault) as error:
            _fail(jobs, ApiError(400, str(error)))
        except Exception as error:
            _fail(jobs, _failure(error))
            if self.team.size > 1:  # the other ranks may be anywhere
                raise
            logger.exception("a batch of %d failed; the server goes on", len(jobs))
        finally:
            self.running = 0
            self.waiting.took(time.monotonic() - began, len(jobs))


def _fail(jobs: Sequence[Job], error: ApiError) -> None:
    for job in jobs:
        job.send(error)


def _failure(error: Exception) -> ApiError:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return ApiError(503, "the model ran out of memory: ask for less at once or smaller pictures.", wait=5)
    return ApiError(500, "the model failed on this request; the server's log says why.")


def follow(bagel: Generator) -> None:
    """What ranks other than 0 do, until rank 0 has ended."""
    team = Team(bagel.network.device)
    while (works := team.tell()) is not None:
        if works:
            try:
                run(bagel, Listener(team, works))
            except (Abandoned, ConfigError, DataFault):  # rank 0 tells the clients
                continue
