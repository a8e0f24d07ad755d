"""Talks to an application in this process: no sockets, so that thousands of requests take seconds."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.types import ASGIApp


@dataclass(frozen=True)
class Sent:
    """A request. `chunks`: the body as it arrives; no more comes when `leaves`."""

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    chunks: Sequence[bytes] = ()
    leaves: bool = False  # the connection is closed behind the last chunk


@dataclass
class Answer:
    """What came back; `events` are those of a stream, parsed."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body)

    def events(self) -> list[dict]:
        lines = self.body.decode().splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def post(path: str, content: dict, **headers: str) -> Sent:
    """JSON for `path`."""
    return Sent("POST", path, {"content-type": "application/json"} | headers, [json.dumps(content).encode()])


async def ask(app: ASGIApp, sent: Sent, leave: asyncio.Event | None = None) -> Answer:
    """The answer of `app`. The client closes the connection when `leave` is set."""
    chunks, answer = list(sent.chunks) or [b""], Answer(0, {}, b"")
    leave = leave or asyncio.Event()

    async def receive() -> dict:
        if chunks:
            chunk = chunks.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(chunks) or sent.leaves}
        if not sent.leaves:
            await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    headers = {"host": "localhost"} | sent.headers
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": sent.method,
        "scheme": "http",
        "path": sent.path,
        "raw_path": sent.path.encode("utf-8", "replace"),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    return answer
