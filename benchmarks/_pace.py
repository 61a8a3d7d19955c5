"""When what is sent over a link arrives: its rate, its delay, and what waits in front of it.

A link's shape lies in memory that its process shares with whoever made it, so that it can change while the link is up: then
everything that is compared crosses the same link, between the same processes.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable

UNHINDERED = (1e12, 0.0)
"""Bits a second and seconds of a link that holds nothing back."""
_SHAPE = struct.Struct("=dd")


class Shape:
    """Rate and delay of a link, each way.

    Args:
        fd: an open file that `create` made, inherited. The shape owns it.

    Attributes:
        fd: to be passed on to the process that is the link.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, _SHAPE.size)

    @classmethod
    def create(cls, bits_per_second: float = UNHINDERED[0], delay_seconds: float = UNHINDERED[1]) -> Shape:
        """A new one."""
        fd = os.memfd_create("shape")
        os.ftruncate(fd, _SHAPE.size)
        made = cls(fd)
        made.set(bits_per_second, delay_seconds)
        return made

    def set(self, bits_per_second: float, delay_seconds: float) -> None:
        """Change it, at best while nothing crosses: what is under way arrives as it would have.

        Raises:
            ValueError: no bit could cross, or some would arrive before they were sent.
        """
        if not bits_per_second > 0 or not delay_seconds >= 0:
            raise ValueError(f"no link has {bits_per_second:g} bits a second and a delay of {delay_seconds:g} s")
        _SHAPE.pack_into(self._memory, 0, bits_per_second, delay_seconds)

    def get(self) -> tuple[float, float]:
        """Bits a second, seconds."""
        bits_per_second, delay_seconds = _SHAPE.unpack_from(self._memory)
        return bits_per_second, delay_seconds

    def close(self) -> None:
        """Give the memory back. May be called again."""
        self._memory.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Pace:
    """One direction of a link: pieces leave one after another, each as long as its bits take, and arrive a delay later.

    Args:
        shape: the link's.
        clock: a monotonic clock in seconds.
    """

    def __init__(self, shape: Shape, clock: Callable[[], float] = time.perf_counter) -> None:
        self._shape = shape
        self._clock = clock
        self._free = 0.0

    def waiting_bytes(self) -> float:
        """What was sent and has not left yet."""
        bits_per_second, _ = self._shape.get()
        return max(0.0, self._free - self._clock()) * bits_per_second / 8

    def due(self, num_bytes: int) -> float:
        """The moment at which a piece that is sent now will have arrived whole."""
        bits_per_second, delay_seconds = self._shape.get()
        self._free = max(self._free, self._clock()) + 8 * num_bytes / bits_per_second
        return self._free + delay_seconds
