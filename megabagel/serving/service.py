"""What the server has: the model's thread, the queue, and the way of a request from the socket into it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict
from typing import Any, TypeVar

import anyio
from anyio import to_thread
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from megabagel.inference import FlowSettings, Generator
from megabagel.serving.limits import ApiError, Limits
from megabagel.serving.prompts import Asked, Prompts
from megabagel.serving.session import Session
from megabagel.serving.waiting import Waiting
from megabagel.serving.worker import Worker

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every broken form
_READERS = 2  # requests that are taken apart at the same time
Result = TypeVar("Result")
Parsed, Wanted = TypeVar("Parsed"), TypeVar("Wanted")


class Left(Exception):
    """The client has closed the connection."""


class Service:
    """`name`: of the model, as clients ask for it. `fetch`: see `Prompts`."""

    def __init__(
        self,
        bagel: Generator,
        name: str,
        limits: Limits,
        defaults: FlowSettings,
        fetch: Callable[[str], bytes] | None = None,
        on_death: Callable[[], None] = lambda: None,
    ):
        self.name, self.limits = name, limits
        self.prompts = Prompts(bagel, limits, defaults, fetch)
        self.waiting = Waiting(limits.max_waiting, limits.max_batch)
        self.worker = Worker(bagel, self.waiting, on_death)
        self._readers = anyio.CapacityLimiter(_READERS)

    async def ask(
        self,
        request: Request,
        media_type: str,
        parse: Callable[[Request, bytes], Awaitable[Parsed]],
        plan: Callable[[Parsed], tuple[Wanted, Asked]],
    ) -> tuple[Wanted, Session]:
        """The request, read, checked and in the queue. `plan` runs in a thread. Raises ApiError."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != media_type:
            raise ApiError(415, f"the Content-Type of this request must be {media_type}.")
        if not self.worker.is_alive():
            raise ApiError(503, "the model is not running.")
        self.waiting.reserve()
        places = 1
        try:
            parsed = await parse(request, await self._body(request))
            wanted, asked = await to_thread.run_sync(plan, parsed, limiter=self._readers)
            self.waiting.reserve(len(asked.works) - 1)
            places = len(asked.works)
            return wanted, Session(self.waiting, asked, self.limits.request_seconds)
        finally:
            self.waiting.release(places)

    def abilities(self) -> dict:
        """What a client should know before it asks."""
        sizes = {"largest": self.prompts.sizes.latent.max_image_size, "step": self.prompts.sizes.latent.image_stride}
        can = {"draws": self.prompts.draws, "sees": self.prompts.sees, "sizes": sizes}
        return can | {"limits": asdict(self.limits), "defaults": asdict(self.prompts.defaults)}

    def known(self, model: str | None) -> None:
        """Raises ApiError for another model."""
        if model not in (None, self.name):
            raise ApiError(
                404, f"there is no such model here; `model` must be {self.name}.", "model", "model_not_found"
            )

    async def _body(self, request: Request) -> bytes:
        most, body = self.limits.max_body_bytes, bytearray()
        too_large = ApiError(413, f"the request has more than {most} bytes.", code="request_too_large")
        declared = request.headers.get("content-length", "0")
        if not (declared.isascii() and declared.isdigit()):
            raise ApiError(400, "the Content-Length is no number.")
        if len(declared) > 15 or int(declared) > most:
            raise too_large
        try:
            with anyio.fail_after(self.limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            message = f"the request did not arrive within {self.limits.body_seconds} s."
            raise ApiError(408, message) from None
        return bytes(body)


async def unless_left(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves. Raises Left. The body must have been read."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Left
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def read_body(_: Request, body: bytes) -> bytes:
    """The body as it is."""
    return body


async def read_parts(request: Request, body: bytes) -> tuple[dict[str, str], list[bytes]]:
    """Texts by name and files of a form (image, image[]). Raises ApiError."""

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    # without the app in its scope a form that is broken raises what it is
    scope = {key: value for key, value in request.scope.items() if key != "app"}
    texts, files = {}, []
    try:
        async with Request(scope, receive).form(max_files=64, max_fields=64, max_part_size=1 << 20) as form:
            for name, value in form.multi_items():
                if isinstance(value, str) and name not in texts and name not in ("image", "image[]", "mask"):
                    texts[name] = value
                elif not isinstance(value, str) and name in ("image", "image[]"):
                    files.append(await value.read())
                else:
                    raise ApiError(400, _form_fault(name, isinstance(value, str)), name[:80])
    except MultiPartException as error:
        raise ApiError(400, f"the form is broken: {error.message[:200].rstrip('.')}.") from None
    if not files:
        raise ApiError(400, "an edit needs a picture: send a file `image`.", "image")
    return texts, files


def _form_fault(name: str, is_text: bool) -> str:
    if name == "mask":
        return "`mask` is not supported: say in the prompt what to change."
    if is_text and name in ("image", "image[]"):
        return f"`{name}` must be a file."
    if is_text:
        return f"`{name[:80]}` was sent twice."
    return f"`{name[:80]}` is a file, but only `image` may be one."
