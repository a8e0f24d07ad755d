"""Who may talk to the server: the key, the names it is called by, and pages of other sites, which may not. Every answer
gets the headers that keep browsers strict."""

import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megabagel.serving.limits import ApiError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Access:
    """`key`: what clients send as `Authorization: Bearer KEY`, None: nothing.

    `hosts`: names in the Host header that are answered, None: all; without such a list a page elsewhere could point its
    own name at this server and read answers (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, key: str | None = None, hosts: Collection[str] | None = LOOPBACK):
        self.app, self.hosts = app, hosts
        self.key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_strictly(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await JSONResponse(error.body(), error.status)(scope, receive, send_strictly)
        else:
            await self.app(scope, receive, send_strictly)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise ApiError(403, "this server is not known by the name in the Host header; see --allowed-hosts.")
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host.lower():
            raise ApiError(403, "pages of other sites may not use this server.")
        if self.key is not None and path.startswith("/v1/"):
            given = headers.get("authorization", "").encode("latin-1", "replace")
            if not hmac.compare_digest(given, self.key):
                raise ApiError(
                    401, "the key is missing or wrong: send `Authorization: Bearer KEY`.", code="invalid_api_key"
                )


def _name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
