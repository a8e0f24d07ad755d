"""The addresses of the server; what happens behind them is in `service.py`, and what comes back in `replies.py`."""

import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from megabagel.serving import replies
from megabagel.serving.access import LOOPBACK, Access
from megabagel.serving.limits import ApiError
from megabagel.serving.prompts import Asked
from megabagel.serving.requests import ChatRequest, ImageRequest, read_form, read_json
from megabagel.serving.service import Left, Service, read_body, read_parts, unless_left
from megabagel.serving.session import Session

PAGE = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
JSON, FORM = "application/json", "multipart/form-data"
_SHUTDOWN_SECONDS = 10.0


def create_app(service: Service, key: str | None = None, hosts: Collection[str] | None = LOOPBACK) -> ASGIApp:
    """`key`, `hosts`: see `Access`. The model's thread runs from startup to shutdown."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.waiting.close()
        await to_thread.run_sync(service.worker.join, _SHUTDOWN_SECONDS)

    # FastAPI's own pages load scripts from elsewhere
    app = FastAPI(title="megabagel", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _add_errors(app)
    _add_state(app, service)
    _add_chat(app, service)
    _add_images(app, service)
    for address, name in FILES.items():
        app.add_api_route(address, partial(_file, name), include_in_schema=False)
    return Access(app, key, hosts)


async def _file(name: str) -> FileResponse:
    return FileResponse(PAGE / name)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        sentence = f"there is nothing for {request.method} at this address."
        return JSONResponse(ApiError(error.status_code, sentence).body(), error.status_code, error.headers)

    @app.exception_handler(Left)
    @app.exception_handler(ClientDisconnect)
    async def nobody(*_: object) -> Response:
        return Response(status_code=499)  # as nginx logs it; nobody reads it

    @app.exception_handler(Exception)
    async def broken(*_: object) -> JSONResponse:
        error = ApiError(500, "the server failed on this request; its log says why.")
        return JSONResponse(error.body(), error.status)


def _add_state(app: FastAPI, service: Service) -> None:
    born = int(time.time())

    def model() -> dict:
        return {"id": service.name, "object": "model", "created": born, "owned_by": "megabagel"} | service.abilities()

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = service.worker.is_alive()
        state = {"waiting": len(service.waiting), "running": service.worker.running}
        return JSONResponse({"status": "ok" if alive else "the model is not running"} | state, 200 if alive else 503)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def one(name: str) -> dict:
        service.known(name)
        return model()


def _add_chat(app: FastAPI, service: Service) -> None:
    def plan(body: bytes) -> tuple[ChatRequest, Asked]:
        wanted = read_json(ChatRequest, body)
        service.known(wanted.model)
        return wanted, service.prompts.chat(wanted)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        wanted, session = await service.ask(request, JSON, read_body, plan)
        if wanted.stream:
            return _events(replies.chat_stream(wanted, session, service.name))
        return JSONResponse(await unless_left(request, replies.chat(session, service.name)))


def _add_images(app: FastAPI, service: Service) -> None:
    def plan_new(body: bytes) -> tuple[ImageRequest, Asked]:
        wanted = read_json(ImageRequest, body)
        service.known(wanted.model)
        return wanted, service.prompts.image(wanted)

    def plan_edit(form: tuple[dict[str, str], list[bytes]]) -> tuple[ImageRequest, Asked]:
        wanted = read_form(ImageRequest, form[0])
        service.known(wanted.model)
        return wanted, service.prompts.image(wanted, form[1])

    async def reply(request: Request, wanted: ImageRequest, session: Session, name: str) -> Response:
        if wanted.stream:
            return _events(replies.image_stream(session, name))
        return JSONResponse(await unless_left(request, replies.images(wanted, session, service.name)))

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        return await reply(request, *await service.ask(request, JSON, read_body, plan_new), "image_generation")

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        return await reply(request, *await service.ask(request, FORM, read_parts, plan_edit), "image_edit")


def _events(stream: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
