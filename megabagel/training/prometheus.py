"""The newest values of a run at http://HOST:PORT/metrics in Prometheus' text format. Needs the extra `prometheus`.

HOST is that of the rank that writes the logs. Names are TensorBoard's in Prometheus' letters, after `megabagel_`.
"""

import re
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from megabagel.training.tags import scalars


class Prometheus:
    """A server in a thread; port 0 takes a free one. Raises OSError when the port is taken."""

    def __init__(self, port: int, run: str) -> None:
        """`run`: label of all values."""
        self._registry, self._run = CollectorRegistry(), run
        self._gauges: dict[str, Gauge] = {}
        self._server, self._thread = start_http_server(port, registry=self._registry)
        self.port: int = self._server.server_port

    def write(self, step: int, record: Mapping[str, float | None]) -> None:
        """What is not measured this time keeps its last value."""
        for tag, value in {**scalars(record), "step": step}.items():
            name = "megabagel_" + re.sub(r"\W", "_", tag, flags=re.ASCII)
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, tag, ["run"], registry=self._registry)
            self._gauges[name].labels(self._run).set(value)

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
