"""Payloads through shared memory between two parties of one machine that proved themselves over TLS.

Heads of frames, and payloads that do not fit, go through TLS as between machines. The other payloads are copied through two
arenas (`shared_memory`). After a `SecureHandshake`, and within its TLS::

    connector → listener    VTM1 | process | two descriptors | two tokens; zeros where it does not want to
    listener → connector    1: mapped; 0: go on as between machines

The connector makes the arenas, sealed against another size, and writes a token of 32 random bytes into each. The listener opens
them as descriptors of the connector's process: the system lets nobody do so who could not read that process's memory anyway.
It maps them if they hold those tokens. So a number that is another process's by now, or another machine's, names nothing, and
a peer cannot point at an arena that is not its own. Whatever is missing or wrong is no error: TLS goes on, and is slower.

*Reveals.* Payloads are in the clear in memory that both ends map, so to this machine's operating system. Only the link between
an enclave and its host may use this, both ends must want it, and both must see the other at a loopback address. The host is
whom those messages are for, and runs that system.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import secrets
import socket
import struct
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Unpack

from veiltune.errors import ProtocolError
from veiltune.transport.channel import ChannelOptions
from veiltune.transport.frame import Frame
from veiltune.transport.secure import SecureHandshake, SecureSocket, closing_on_failure
from veiltune.transport.secure_channel import SecureChannel
from veiltune.transport.shared_memory import ARENA_NAME, DEFAULT_ARENA_BYTES, SharedArena, SharedMemoryChannel
from veiltune.transport.stream import TOKEN_BYTES, SocketChannel, handshake_deadline, is_loopback, read_exactly

_OFFER: Final = struct.Struct(f">4sIII{TOKEN_BYTES}s{TOKEN_BYTES}s")
_OFFERS: Final = b"VTM1"
_NOTHING: Final = (0, 0, 0, bytes(TOKEN_BYTES), bytes(TOKEN_BYTES))

Arenas = tuple[SharedArena, SharedArena]
"""Written by this end, read by this end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryHandshake:
    """A `SecureHandshake`, and then arenas, if both ends want them and can have them. Both ends must use this one.

    Attributes:
        secure: proves both ends.
        wanted: whether this end wants arenas.
    """

    secure: SecureHandshake
    wanted: bool

    def __call__(self, sock: socket.socket) -> SecureSocket:
        """See `stream.Handshake`. On any failure the connection is closed.

        Raises:
            ProtocolError: as `SecureHandshake`; or what comes after it is no offer, and no answer to one.
        """
        deadline = handshake_deadline(sock)
        tls = self.secure(sock)
        with closing_on_failure(tls):
            is_here = tls.family != socket.AF_UNIX and is_loopback(tls.getpeername()[0])
            tls.arenas = (_answer if self.secure.listening else _offer)(tls, deadline, wanted=self.wanted and is_here)
        return tls


def _offer(tls: SecureSocket, deadline: float, *, wanted: bool) -> Arenas | None:
    if not wanted or not hasattr(os, "memfd_create"):
        tls.sendall(_OFFER.pack(_OFFERS, *_NOTHING))
        _read_answer(tls, deadline)
        return None
    arenas = (SharedArena.create(), SharedArena.create())
    tokens = [secrets.token_bytes(TOKEN_BYTES) for _ in arenas]
    for arena, token in zip(arenas, tokens, strict=True):
        arena.set_token(token)
    is_taken = False
    try:
        tls.sendall(_OFFER.pack(_OFFERS, os.getpid(), *(arena.fd for arena in arenas), *tokens))
        is_taken = _read_answer(tls, deadline)
    finally:
        for arena in arenas:
            (arena.release_fd if is_taken else arena.close)()
    return arenas if is_taken else None


def _read_answer(tls: SecureSocket, deadline: float) -> bool:
    answer = read_exactly(tls, 1, deadline)[0]
    if answer not in {0, 1}:
        raise ProtocolError(f"the peer answered {answer} to an offer of shared memory")
    return answer == 1


def _answer(tls: SecureSocket, deadline: float, *, wanted: bool) -> Arenas | None:
    magic, process, *rest = _OFFER.unpack(read_exactly(tls, _OFFER.size, deadline))
    if magic != _OFFERS:
        raise ProtocolError("what came after the handshake is no offer of shared memory", hint="use one version")
    mapped: list[SharedArena] = []
    if wanted and process:
        found = [_mapped(process, fd, token) for fd, token in zip(rest[:2], rest[2:], strict=True)]
        mapped = [arena for arena in found if arena is not None]
    if len(mapped) < 2:
        for arena in mapped:
            arena.close()
        mapped = []
    tls.sendall(bytes([bool(mapped)]))
    return (mapped[1], mapped[0]) if mapped else None


def _mapped(process: int, descriptor: int, token: bytes) -> SharedArena | None:
    """The arena behind a process's descriptor, if it is one that cannot shrink and holds the token."""
    path = Path(f"/proc/{process}/fd/{descriptor}")
    arena: SharedArena | None = None
    with suppress(OSError, ProtocolError):
        if path.readlink().name.partition(" ")[0] != f"memfd:{ARENA_NAME}":  # opening some files does something
            return None
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                arena = SharedArena.attach(fd, DEFAULT_ARENA_BYTES)
        finally:
            if arena is None:
                os.close(fd)
    if arena is None:
        return None
    arena.release_fd()
    if hmac.compare_digest(arena.token(), token):
        return arena
    arena.close()
    return None


class SecureMemoryChannel(SharedMemoryChannel, SecureChannel):
    """Frames between two parties of one machine: what is in the clear in shared memory, only the two of them map.

    Args: as of `SharedMemoryChannel`, over what a `MemoryHandshake` returned.
    """

    def _send_frame(self, frame: Frame) -> None:
        with self._while_mapped():
            super()._send_frame(frame)

    def _recv_payload(self, segments: list[memoryview], num_bytes: int) -> None:
        with self._while_mapped():
            super()._recv_payload(segments, num_bytes)

    @contextmanager
    def _while_mapped(self) -> Generator[None]:
        """A service closes its links from another thread, which takes the memory away in the middle of a message."""
        try:
            yield
        except ValueError:
            if not self._closed:
                raise
            raise self._lost() from None


def open_channel(sock: socket.socket, me: str, peer: str, **options: Unpack[ChannelOptions]) -> SocketChannel:
    """The channel over what `stream.connect` or `stream.accept` returned, whichever handshake it was.

    Raises:
        ProtocolError: another party than ``peer`` proved to be at the other end.
    """
    if isinstance(sock, SecureSocket):
        if sock.arenas is None:
            return SecureChannel(sock, me, peer, **options)
        return SecureMemoryChannel(sock, *sock.arenas, me, peer, **options)
    return SocketChannel(sock, me, peer, **options)
