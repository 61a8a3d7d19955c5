"""Whether a service lives, whether it takes sessions, and what it has done so far, over HTTP on this machine alone.

``/healthz`` answers 200 while the process runs its loop; ``/readyz`` 200 while it takes sessions, else 503; ``/metrics`` is
Prometheus' text format (version 0.0.4): counts of sessions, refusals, steps, messages and bytes by kind. Names of parties
and of kinds of message are all the words in it: no text, no key, no path.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Final

from veiltune.errors import ConfigError
from veiltune.transport.stream import is_loopback, parse_address
from veiltune.transport.transcript import Meter

_COUNTED: Final[Mapping[str, str]] = {
    "session_ended": "sessions that ended in order",
    "owner_gone": "sessions whose other end went away",
    "refused": "sessions that were refused, or ended with an error",
    "turned_away": "connections that did not prove themselves, or were too many",
}
_STEPS: Final = frozenset({"OptimizerStep", "TrunkBackward", "FactorGradientsRequest"})
"""Kinds of which a party gets one a step: as the trainer or with the optimiser, as the trunk of a cut model, as a host."""
_REQUEST_SECONDS: Final = 2.0


class Health:
    """What a service counts.

    Args:
        role: which party.
        design: of which design.
        meter: counts what crosses.

    Attributes:
        is_ready: it takes sessions.
    """

    def __init__(self, role: str, design: str, meter: Meter) -> None:
        self.role = role
        self.design = design
        self.is_ready = False
        self._meter = meter
        self._events: Counter[str] = Counter()
        self._open = 0
        self._guard = threading.Lock()

    def count(self, event: str) -> None:
        """One event of the service."""
        if event in _COUNTED:
            with self._guard:
                self._events[event] += 1

    @contextmanager
    def session(self) -> Generator[None]:
        """A link that proved itself is open while this is entered."""
        with self._guard:
            self._open += 1
        try:
            yield
        finally:
            with self._guard:
                self._open -= 1

    def metrics(self) -> str:
        """All counts in Prometheus' text format."""
        with self._guard:
            events, links = Counter(self._events), self._open
        traffic = self._meter.snapshot()
        mine = f"->{self.role}"
        steps = sum(
            c["messages"]
            for pair, kinds in traffic.items()
            if pair.endswith(mine)
            for k, c in kinds.items()
            if k in _STEPS
        )
        lines = [
            *_metric("ready", "gauge", "whether sessions are taken", {"": int(self.is_ready)}),
            *_metric("links_open", "gauge", "links that proved themselves and are open", {"": links}),
            *_metric("steps_total", "counter", "training steps that reached this party", {"": steps}),
        ]
        for event, what in _COUNTED.items():
            lines += _metric(f"{event}_total", "counter", what, {"": events[event]})
        for unit in ("messages", "bytes"):
            found = {
                f'sender="{sender}",receiver="{receiver}",kind="{kind}"': counts[unit]
                for pair, kinds in traffic.items()
                for sender, receiver in [pair.split("->")]
                for kind, counts in kinds.items()
            }
            lines += _metric(f"{unit}_total", "counter", f"{unit} that crossed, by kind of message", found)
        return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, what: str, values: Mapping[str, float]) -> Iterator[str]:
    yield f"# HELP veiltune_{name} {what}"
    yield f"# TYPE veiltune_{name} {kind}"
    for labels, value in values.items():
        yield f"veiltune_{name}{{{labels}}} {value}" if labels else f"veiltune_{name} {value}"


class HealthServer:
    """Answers one request at a time, each within two seconds, in a thread of its own.

    Args:
        health: what is told.
        address: ``HOST:PORT``, on loopback.

    Raises:
        ConfigError: the address is none, leaves this machine, or is taken.
    """

    def __init__(self, health: Health, address: str) -> None:
        host, port = parse_address(address)
        if not is_loopback(host):
            raise ConfigError(
                f"session.health = {address!r} would be reachable from other machines",
                hint="give an address of loopback, such as 127.0.0.1:9464, and let a local agent collect from there",
            )
        try:
            self._server = HTTPServer((host, port), _handler(health))
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {address}: {error.strerror or error}", hint="choose another session.health"
            ) from None
        self.address = f"{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def _handler(health: Health) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Three paths, GET alone."""

        timeout = _REQUEST_SECONDS

        def do_GET(self) -> None:
            """Answer."""
            answers = {
                "/healthz": (200, "ok\n"),
                "/readyz": (200, "ready\n") if health.is_ready else (503, "not ready\n"),
                "/metrics": (200, health.metrics()),
            }
            status, text = answers.get(self.path, (404, "healthz, readyz or metrics\n"))
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
            """Say nothing: requests come every few seconds."""

    return Handler
