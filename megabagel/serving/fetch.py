"""Pictures from addresses on hosts that the server's owner has named.

No other host is ever asked, redirects included: no client may make the server look around in its own network.
"""

import urllib.error
import urllib.request
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from megabagel.serving.limits import ApiError

_SECONDS = 10.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def fetcher(hosts: Collection[str], max_bytes: int) -> Callable[[str], bytes]:
    """A function from an http(s) address on one of `hosts` (host, or host:port) to its bytes; it raises ApiError."""
    opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))

    def fetch(url: str) -> bytes:
        host = _host(url)
        if host not in hosts:
            raise ApiError(400, "this server fetches no pictures from that host: send a data: URL.", "image_url")
        try:
            with opener.open(url, timeout=_SECONDS) as answer:
                content = answer.read(max_bytes + 1)
        except (OSError, ValueError, urllib.error.URLError) as error:
            reason = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else "no answer"
            raise ApiError(400, f"a picture could not be fetched from {host}: {reason}.", "image_url") from None
        if len(content) > max_bytes:
            raise ApiError(413, f"a picture from {host} has more than {max_bytes} bytes.", "image_url")
        return content

    return fetch


def _host(url: str) -> str | None:
    """Host, with the port where one is given; None for an address with credentials or without a host."""
    try:
        parts = urlsplit(url)
        return None if "@" in parts.netloc or not url.isascii() or not url.isprintable() else parts.netloc.lower()
    except ValueError:
        return None
