"""A link with a rate and a delay between two processes of one machine: a relay that holds every byte back until it is due.

For machines whose kernel cannot delay packets. Of sessions that are opened inside `shaped`, the link that carries tensors at
every step goes through a relay, which is a process of its own. Each direction has the rate to itself, as in full duplex.
"""

from __future__ import annotations

import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from veiltune.session import launch

_PIECE = 1 << 16
_PENDING = 256
"""Pieces under way in one direction at most: 16 MiB, so that a sender is held back as by a full socket."""

Due = queue.Queue[tuple[float, bytes]]


def _receive(source: socket.socket, due: Due, bits_per_second: float, delay_seconds: float) -> None:
    """Note of each piece when its last bit will have arrived; an empty piece ends it."""
    free = 0.0
    while True:
        try:
            piece = source.recv(_PIECE)
        except OSError:
            piece = b""
        free = max(free, time.perf_counter()) + 8 * len(piece) / bits_per_second
        due.put((free + delay_seconds, piece))
        if not piece:
            return


def _send(sink: socket.socket, due: Due) -> None:
    while True:
        moment, piece = due.get()
        wait = moment - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        try:
            if not piece:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(piece)
        except OSError:
            return


def relay(first: socket.socket, second: socket.socket, bits_per_second: float, delay_seconds: float) -> None:
    """Carry both directions until both have ended."""
    threads = []
    for source, sink in ((first, second), (second, first)):
        due: Due = queue.Queue(_PENDING)
        threads.append(threading.Thread(target=_receive, args=(source, due, bits_per_second, delay_seconds)))
        threads.append(threading.Thread(target=_send, args=(sink, due)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def shaped_pair(bits_per_second: float, delay_seconds: float) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets; what is sent into one comes out of the other at that rate and after that delay."""
    (first, inner_first), (inner_second, second) = socket.socketpair(), socket.socketpair()
    fds = (inner_first.fileno(), inner_second.fileno())
    command = [sys.executable, "-m", "benchmarks._link", *map(str, (*fds, bits_per_second, delay_seconds))]
    subprocess.Popen(command, pass_fds=fds)  # it ends with the link
    inner_first.close()
    inner_second.close()
    return first, second


@contextmanager
def shaped(bits_per_second: float, delay_seconds: float) -> Generator[None]:
    """Sessions that are started inside have such a data plane."""
    original = launch._wire

    def wire(config: Any, design: Any, a: str, b: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        if (a, b) != design.data_plane:
            yield from original(config, design, a, b)
            return
        first, second = shaped_pair(bits_per_second, delay_seconds)
        yield a, b, {"kind": "socket", "fds": [first.detach()]}
        yield b, a, {"kind": "socket", "fds": [second.detach()]}

    launch._wire = wire
    try:
        yield
    finally:
        launch._wire = original


if __name__ == "__main__":
    relay(
        socket.socket(fileno=int(sys.argv[1])),
        socket.socket(fileno=int(sys.argv[2])),
        float(sys.argv[3]),
        float(sys.argv[4]),
    )
