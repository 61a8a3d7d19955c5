"""A link with a rate and a delay between two processes of one machine: a relay that holds every byte back until it is due.

For machines whose kernel cannot delay packets. Of sessions that are opened inside `shaped`, the link that carries tensors at
every step goes through a relay, which is a process of its own: enclave and host, or owner and provider. Each direction has the
rate to itself, as in full duplex. Bytes pass in order and none is lost, so there is nothing of TCP's caution here; `_wire`
has it.
"""

from __future__ import annotations

import queue
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks._pace import Pace, Shape

_PIECE = 1 << 16
_PENDING = 256
"""Pieces under way in one direction at most: 16 MiB, so that a sender is held back as by a full socket."""
_ECHOES = 20
_PROBE_SECONDS, _PROBE_BYTES = 0.5, 64 << 20

Due = queue.Queue[tuple[float, bytes]]


def _receive(source: socket.socket, due: Due, pace: Pace) -> None:
    """Note of each piece when its last bit will have arrived; an empty piece ends it."""
    while True:
        try:
            piece = source.recv(_PIECE)
        except OSError:
            piece = b""
        due.put((pace.due(len(piece)), piece))
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


def relay(first: socket.socket, second: socket.socket, shape: Shape) -> None:
    """Carry both directions until both have ended."""
    threads = []
    for source, sink in ((first, second), (second, first)):
        due: Due = queue.Queue(_PENDING)
        threads.append(threading.Thread(target=_receive, args=(source, due, Pace(shape))))
        threads.append(threading.Thread(target=_send, args=(sink, due)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def shaped_pair(shape: Shape) -> tuple[socket.socket, socket.socket, subprocess.Popen[bytes]]:
    """Two connected sockets; what is sent into one comes out of the other as the shape says. The relay ends with them."""
    (first, inner_first), (inner_second, second) = socket.socketpair(), socket.socketpair()
    fds = (inner_first.fileno(), inner_second.fileno(), shape.fd)
    command = [sys.executable, "-m", "benchmarks._link", *map(str, fds)]
    process = subprocess.Popen(command, pass_fds=fds, cwd=Path(__file__).parents[1])
    inner_first.close()
    inner_second.close()
    return first, second, process


@contextmanager
def shaped(shape: Shape) -> Generator[None]:
    """Sessions that are started, and ended, inside have such a data plane. Its shape may change while they are open."""
    from veiltune.session import launch

    original = launch._wire
    relays: list[subprocess.Popen[bytes]] = []

    def wire(config: Any, design: Any, a: str, b: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        if (a, b) != design.data_plane:
            yield from original(config, design, a, b)
            return
        first, second, process = shaped_pair(shape)
        relays.append(process)
        yield a, b, {"kind": "socket", "fds": [first.detach()]}
        yield b, a, {"kind": "socket", "fds": [second.detach()]}

    launch._wire = wire
    try:
        yield
    finally:
        launch._wire = original
        for process in relays:
            process.wait()


def probe(shape: Shape) -> dict[str, float]:
    """What a link of this shape really does on this machine: seconds there and back, and bits a second one way."""
    bits_per_second, _ = shape.get()
    num_bytes = min(_PROBE_BYTES, max(_PIECE, int(_PROBE_SECONDS * bits_per_second / 8)))
    near, far, process = shaped_pair(shape)
    answering = threading.Thread(target=_answer, args=(far, num_bytes))
    answering.start()
    with near:
        echoes = [_echo(near, b"\0") for _ in range(_ECHOES + 1)][1:]  # the relay is up with the first
        round_trip = statistics.median(echoes)
        seconds = _echo(near, bytes(num_bytes)) - round_trip
        near.shutdown(socket.SHUT_WR)
    answering.join()
    process.wait()
    return {"measured_round_trip_seconds": round_trip, "measured_bits_per_second": 8 * num_bytes / seconds}


def _echo(near: socket.socket, piece: bytes) -> float:
    """Seconds until a piece is answered by one byte."""
    start = time.perf_counter()
    near.sendall(piece)
    near.recv(1)
    return time.perf_counter() - start


def _answer(far: socket.socket, num_bytes: int) -> None:
    """One byte for each of the single bytes, then one for so many in a row."""
    with far:
        for wanted in (*[1] * (_ECHOES + 1), num_bytes):
            got = 0
            while got < wanted:
                got += len(far.recv(min(1 << 20, wanted - got)))
            far.sendall(b"\0")


if __name__ == "__main__":
    one, other, inherited = map(int, sys.argv[1:])
    relay(socket.socket(fileno=one), socket.socket(fileno=other), Shape(inherited))
