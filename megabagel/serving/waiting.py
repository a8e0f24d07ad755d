"""The bounded queue between the clients and the model. A place is taken before a request is read, so that what has not
been read cannot fill the memory either."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megabagel.serving.limits import ApiError
from megabagel.serving.work import Work


@dataclass(eq=False)
class Job:
    """One work and its client. `send` may be called from any thread; after `drop` nobody listens."""

    work: Work
    stops: tuple[str, ...]
    send: Callable[[Any], None]
    dropped: bool = False


class Waiting:
    """First come, first served; works that can be done with the first one go along."""

    def __init__(self, places: int, max_batch: int):
        self.places, self.max_batch = places, max_batch
        self._jobs: list[Job] = []
        self._reserved = 0  # places of requests that are being read
        self._changed = threading.Condition()
        self._closed = False
        self._seconds_per_job = 1.0  # a moving average

    def reserve(self, count: int = 1) -> None:
        """Keep `count` places. Raises ApiError (429) when there are not so many."""
        with self._changed:
            if self._closed:
                raise ApiError(503, "the server is shutting down; try another one.", wait=5)
            taken = self._reserved + len(self._jobs)
            if taken + count > self.places:
                wait = min(120, max(1, round(taken * self._seconds_per_job)))
                message = (
                    f"the queue is full: {taken} of its {self.places} places are taken and the request needs {count}; "
                    f"try again in {wait} s."
                )
                raise ApiError(429, message, code="queue_full", wait=wait)
            self._reserved += count

    def release(self, count: int = 1) -> None:
        """Give reserved places back."""
        with self._changed:
            self._reserved -= count

    def put(self, jobs: list[Job]) -> None:
        """Each takes a place of its own; release the reserved ones afterwards."""
        with self._changed:
            self._jobs += jobs
            self._changed.notify()

    def drop(self, jobs: list[Job]) -> None:
        """Their client has left."""
        with self._changed:
            for job in jobs:
                job.dropped = True
            self._jobs = [job for job in self._jobs if not job.dropped]

    def take(self, seconds: float) -> list[Job] | None:
        """The first job and those that can be done with it, [] if none came within `seconds`; None: closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed, seconds)
            if self._closed:
                return None
            call = self._jobs[0].work.call if self._jobs else None
            batch = [job for job in self._jobs if job.work.call == call][: self.max_batch]
            self._jobs = [job for job in self._jobs if job not in batch]
            return batch

    def took(self, seconds: float, jobs: int) -> None:
        """A batch of so many jobs was worked on for so long."""
        self._seconds_per_job += 0.2 * (seconds / jobs - self._seconds_per_job)

    def close(self) -> None:
        """Take nothing any more; those that wait are told."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.send(ApiError(503, "the server is shutting down; try another one.", wait=5))
            self._jobs = []
            self._changed.notify()

    def __len__(self) -> int:
        with self._changed:
            return len(self._jobs)
