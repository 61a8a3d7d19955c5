"""A cable with a rate and a delay between two network namespaces: a process that carries frames from one TAP device to another.

For kernels without netem. The parties at its ends use the kernel's own TCP, which sees a real link: a frame waits for those
before it, takes its bits' time to leave and arrives a delay later; where too many wait, as in a router, one that comes is lost.

Linux only, and only where namespaces and TAP devices may be made.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks._pace import Pace, Shape

QUEUE_BYTES = 256 << 10
"""What may wait at one end: some 40 ms at 50 Mbit/s."""
READY = b"ready\n"
_FRAME_BYTES = 1 << 16
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_CLONE_NEWNET = 0x40000000


class End(NamedTuple):
    """Where a cable ends.

    Attributes:
        namespace: of ``ip netns``.
        device: the name of the TAP device there, which is made.
    """

    namespace: str
    device: str


class NoWireError(Exception):
    """There can be no such cable here; says why."""


class Direction:
    """Frames on their way from one end to the other.

    Args:
        shape: the cable's.
        sink: a descriptor at the other end.
        queue_bytes: what may wait to leave.

    Attributes:
        dropped: frames lost, because too many waited.
    """

    def __init__(self, shape: Shape, sink: int, queue_bytes: int = QUEUE_BYTES) -> None:
        self.pace = Pace(shape)
        self.dropped = 0
        self._sink = sink
        self._queue_bytes = queue_bytes
        self._under_way: deque[tuple[float, bytes]] = deque()

    def take(self, frame: bytes) -> None:
        """A frame has come."""
        if self.pace.waiting_bytes() + len(frame) > self._queue_bytes:
            self.dropped += 1
            return
        self._under_way.append((self.pace.due(len(frame)), frame))

    def deliver(self, now: float) -> float | None:
        """Write out the frames that are due; the moment at which the next one is."""
        while self._under_way and self._under_way[0][0] <= now:
            with suppress(OSError):  # no device takes a frame while it is down
                os.write(self._sink, self._under_way.popleft()[1])
        return self._under_way[0][0] if self._under_way else None


def carry(first: int, second: int, shape: Shape, stop: int) -> None:
    """Carry frames both ways between two descriptors, until something can be read from ``stop``."""
    none: list[int] = []
    directions = {first: Direction(shape, second), second: Direction(shape, first)}
    while True:
        moments = [each.deliver(time.perf_counter()) for each in directions.values()]
        due = [moment for moment in moments if moment is not None]
        wait = max(0.0, min(due) - time.perf_counter()) if due else None
        ready, _, _ = select.select([*directions, stop], none, none, wait)
        if stop in ready:
            return
        for source in ready:
            with suppress(OSError):
                directions[source].take(os.read(source, _FRAME_BYTES))


def _tap(end: End) -> int:
    """A new TAP device in a namespace. Its descriptor is of use anywhere."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{end.namespace}").open("rb") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {end.namespace}")
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", end.device.encode(), _IFF_TAP | _IFF_NO_PI))
    return fd


@contextmanager
def wire(first: End, second: End, shape: Shape) -> Generator[None]:
    """A cable between two namespaces, for as long as the context lasts. Its devices are down at first.

    Raises:
        NoWireError: this machine does not permit it.
    """
    command = [sys.executable, "-m", "benchmarks._wire", *first, *second, str(shape.fd)]
    with subprocess.Popen(
        command,
        pass_fds=[shape.fd],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None  # noqa: S101
        assert process.stdout is not None  # noqa: S101
        assert process.stderr is not None  # noqa: S101
        if process.stdout.readline() != READY:
            raise NoWireError(process.stderr.read().decode(errors="replace").strip())
        try:
            yield
        finally:
            process.stdin.close()  # it ends with that


def _main(words: list[str]) -> int:
    try:
        first, second = _tap(End(*words[0:2])), _tap(End(*words[2:4]))
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    carry(first, second, Shape(int(words[4])), sys.stdin.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
