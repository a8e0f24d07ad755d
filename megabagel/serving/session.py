"""One request from the queue to its last event: the bridge from the model's thread to the event loop."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from functools import partial

from megabagel.serving.limits import ApiError
from megabagel.serving.prompts import Asked
from megabagel.serving.waiting import Job, Waiting
from megabagel.serving.worker import Delta, Done, Step

Event = Delta | Step | Done


class Session:
    """Puts the works of `asked` into the queue. Make it in the event loop."""

    def __init__(self, waiting: Waiting, asked: Asked, seconds: float):
        self.asked, self._waiting, self._seconds = asked, waiting, seconds
        self._deadline = time.monotonic() + seconds
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()
        self._jobs = [Job(work, asked.stops, partial(self._post, n)) for n, work in enumerate(asked.works)]
        waiting.put(self._jobs)

    def _post(self, number: int, event: Event | ApiError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the client
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Of each work, by number, until all are done. Raises ApiError.

        However it ends, the model works on none of them afterwards.
        """
        going = len(self._jobs)
        try:
            while going:
                try:
                    number, event = await asyncio.wait_for(self._events.get(), self._deadline - time.monotonic())
                except asyncio.TimeoutError:
                    message = f"the request took more than {self._seconds} s, waiting included; ask for less at once."
                    raise ApiError(504, message, code="timeout") from None
                if isinstance(event, ApiError):
                    raise event
                yield number, event
                going -= isinstance(event, Done)
        finally:
            self._waiting.drop(self._jobs)

    async def results(self) -> list[tuple[str, Done]]:
        """Text and end of each work."""
        texts, ends = [""] * len(self._jobs), {}
        async with contextlib.aclosing(self.events()) as events:
            async for number, event in events:
                if isinstance(event, Delta):
                    texts[number] += event.text
                elif isinstance(event, Done):
                    ends[number] = event
        return [(text, ends[number]) for number, text in enumerate(texts)]
