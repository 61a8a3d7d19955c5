"""Frames between two processes of one machine: payloads through shared memory, heads through a socket as the doorbell.

A payload is copied once out of the sender's tensor into a ring that both processes map, and once from there into the
receiver's fresh tensor. Nothing is parsed in shared memory: the header that says what the payload is comes through the
socket, and tensors are used only after the copy, so a peer that goes on writing changes nothing that was checked.

Layout of an arena: one page of counters, then the ring. The only counter is a 64-bit one at byte 64, which the receiver
advances: bytes it has copied out, ever. The sender counts what it wrote by itself and learns from the counter how much
of the ring is free; the receiver needs no counter of the sender's, for the doorbell tells it what to read next. The 32 bytes
from byte 128 on are for whoever has to recognise an arena that it opened by a number (`one_machine`).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Self, Unpack

from veiltune.errors import ProtocolError
from veiltune.transport.channel import ChannelOptions
from veiltune.transport.frame import Frame
from veiltune.transport.stream import SocketChannel

DEFAULT_ARENA_BYTES = 16 << 20
ARENA_NAME = "veiltune-arena"
_PAGE_BYTES = 4096
_MEMORY_DIRECTORY = Path("/dev/shm")  # noqa: S108 - only with mkstemp, and unlinked at once
_COUNTER = 8  # index of a 64-bit word, in a cache line of its own
_TOKEN = slice(128, 160)
_FIRST_SLEEP_SECONDS, _LONGEST_SLEEP_SECONDS = 20e-6, 1e-3


class SharedArena:
    """A ring of bytes that two processes map: one writes, the other reads. Each end makes its own object.

    Make one with `create`, pass ``fd`` to the other process (``pass_fds``), and `attach` there.

    Args:
        fd: an open file of one page plus ``num_bytes``. The arena owns it.
        num_bytes: the ring's size.
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        self.fd = fd
        self.num_bytes = num_bytes
        self._map = mmap.mmap(fd, _PAGE_BYTES + num_bytes)
        self._whole = memoryview(self._map)
        self._counters = self._whole[:_PAGE_BYTES].cast("Q")
        self._ring = self._whole[_PAGE_BYTES:]
        self._done = 0  # bytes this end has written, or read, ever
        self._barrier = threading.Lock()

    @classmethod
    def create(cls, num_bytes: int = DEFAULT_ARENA_BYTES) -> Self:
        """A new arena that has no name in any file system and that only this user could have opened."""
        if num_bytes < 1:
            raise ValueError(f"an arena needs at least one byte, not {num_bytes}")
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create(ARENA_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, _PAGE_BYTES + num_bytes)
            # A peer that shrank the file would kill this process at its next access.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        else:
            fd, path = tempfile.mkstemp(
                prefix="veiltune-", dir=_MEMORY_DIRECTORY if _MEMORY_DIRECTORY.is_dir() else None
            )
            Path(path).unlink()
            os.ftruncate(fd, _PAGE_BYTES + num_bytes)
        return cls(fd, num_bytes)

    @classmethod
    def attach(cls, fd: int, num_bytes: int) -> Self:
        """Map an arena that another process created, from the descriptor it passed.

        Raises:
            ProtocolError: the file has another size.
        """
        actual = os.fstat(fd).st_size
        if actual != _PAGE_BYTES + num_bytes:
            raise ProtocolError(f"the shared arena has {actual} bytes, not {_PAGE_BYTES + num_bytes}")
        return cls(fd, num_bytes)

    @property
    def room(self) -> int:
        """Bytes that the writing end can write now.

        Raises:
            ProtocolError: the reader's counter is impossible.
        """
        in_flight = self._done - self._counters[_COUNTER]
        if not 0 <= in_flight <= self.num_bytes:
            raise ProtocolError(
                f"the shared arena's counter says that {in_flight} of {self.num_bytes} bytes are in flight"
            )
        return self.num_bytes - in_flight

    def write(self, segments: list[memoryview], total: int) -> None:
        """Append ``total`` bytes. There must be `room` for them."""
        position = self._done % self.num_bytes
        for segment in segments:
            size = len(segment)
            first = min(size, self.num_bytes - position)
            self._ring[position : position + first] = segment[:first]
            if first < size:
                self._ring[: size - first] = segment[first:]
            position = (position + size) % self.num_bytes
        self._done += total

    def read(self, segments: list[memoryview], total: int) -> None:
        """Take the next ``total`` bytes, which must have been announced, and give their room back."""
        position = self._done % self.num_bytes
        for segment in segments:
            size = len(segment)
            first = min(size, self.num_bytes - position)
            segment[:first] = self._ring[position : position + first]
            if first < size:
                segment[first:] = self._ring[: size - first]
            position = (position + size) % self.num_bytes
        self._done += total
        with self._barrier:
            pass  # with the lock below: on any processor, the copies are over before the counter says so
        with self._barrier:
            self._counters[_COUNTER] = self._done

    def set_token(self, token: bytes) -> None:
        """Write 32 bytes by which the other end recognises this arena."""
        self._whole[_TOKEN] = token

    def token(self) -> bytes:
        """The 32 bytes that `set_token` wrote; zeros before."""
        return bytes(self._whole[_TOKEN])

    def release_fd(self) -> None:
        """Close the descriptor, once it need not be passed on any more. The mapping stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def close(self) -> None:
        """Unmap. May be called again."""
        self.release_fd()
        for view in (self._ring, self._counters, self._whole):
            view.release()
        self._map.close()


class SharedMemoryChannel(SocketChannel):
    """Frames between processes of one machine. A payload longer than the arena goes through the socket instead.

    Args:
        sock: a connected socket; a socket pair is best. The channel owns it and both arenas.
        arena_out: written by this end.
        arena_in: read by this end.
        me: the party at this end.
        peer: the party at the other end.
        options: see `ChannelOptions`.
    """

    def __init__(
        self,
        sock: socket.socket,
        arena_out: SharedArena,
        arena_in: SharedArena,
        me: str,
        peer: str,
        **options: Unpack[ChannelOptions],
    ) -> None:
        super().__init__(sock, me, peer, **options)
        self._out = arena_out
        self._in = arena_in
        self._hangup = select.poll()
        self._hangup.register(sock, 0)  # tells of a hang-up and of errors only

    @classmethod
    def from_fds(
        cls, fds: tuple[int, int, int], num_bytes: int, me: str, peer: str, **options: Unpack[ChannelOptions]
    ) -> Self:
        """The channel over inherited descriptors: socket, outgoing arena, incoming arena, of ``num_bytes`` each."""
        sock_fd, out_fd, in_fd = fds
        arenas = (SharedArena.attach(out_fd, num_bytes), SharedArena.attach(in_fd, num_bytes))
        for arena in arenas:
            arena.release_fd()
        return cls(socket.socket(fileno=sock_fd), *arenas, me, peer, **options)

    def close(self) -> None:
        """See `Channel.close`. What the peer has not read yet stays readable to it."""
        super().close()
        self._out.close()
        self._in.close()

    def _send_frame(self, frame: Frame) -> None:
        if frame.payload_bytes > self._out.num_bytes:
            super()._send_frame(frame)
            return
        self._await_room(frame.payload_bytes)
        self._out.write(frame.segments, frame.payload_bytes)
        self._send_pieces([memoryview(frame.head)])

    def _recv_payload(self, segments: list[memoryview], num_bytes: int) -> None:
        if num_bytes > self._in.num_bytes:
            super()._recv_payload(segments, num_bytes)
        else:
            self._in.read(segments, num_bytes)

    def _await_room(self, num_bytes: int) -> None:
        deadline = time.monotonic() + self._stall_seconds
        seconds = _FIRST_SLEEP_SECONDS
        while self._out.room < num_bytes:
            if self._hangup.poll(0):
                raise self._lost()
            if time.monotonic() > deadline:
                raise self._lost(f"took nothing out of the shared arena for {self._stall_seconds:g} s")
            time.sleep(seconds)
            seconds = min(2 * seconds, _LONGEST_SLEEP_SECONDS)


def open_link(num_bytes: int = DEFAULT_ARENA_BYTES) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The descriptors of a link's two ends, each for one `SharedMemoryChannel.from_fds`, here or in a child process.

    Whoever passes an end to a child must close its own copies, or the peer's death will go unnoticed.
    """
    a, b = socket.socketpair()
    forth, back = SharedArena.create(num_bytes), SharedArena.create(num_bytes)
    ends = (a.detach(), os.dup(forth.fd), os.dup(back.fd)), (b.detach(), os.dup(back.fd), os.dup(forth.fd))
    forth.close()
    back.close()
    return ends
