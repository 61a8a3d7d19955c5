"""Frames over a `SecureSocket`: as `SocketChannel`, through TLS."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Unpack

from veiltune.errors import PeerLostError, ProtocolError
from veiltune.transport.channel import UNREACHABLE, ChannelOptions
from veiltune.transport.secure import SecureSocket
from veiltune.transport.stream import SocketChannel

RECORD_BYTES = 1 << 14
"""The most that TLS puts into one record."""


class SecureChannel(SocketChannel):
    """Frames over a TLS connection whose peer has proved itself; the channel then owns it.

    Its sockets never block, so that one lock can guard them: OpenSSL lets only one thread at a time use a connection,
    while a channel may be read by one thread and written to by another.

    Args:
        sock: what a `SecureHandshake` returned.
        me: the party at this end.
        peer: the party at the other end; it must be the one that proved to be there.
        options: see `ChannelOptions`.

    Raises:
        ProtocolError: somebody else is there.
    """

    def __init__(self, sock: SecureSocket, me: str, peer: str, **options: Unpack[ChannelOptions]) -> None:
        if sock.peer.role != peer:
            raise ProtocolError(f"the {sock.peer.role} is at the other end of a link that was to be the {peer}'s")
        super().__init__(sock, me, peer, **options)
        self.peer_pin, self.own_pin = sock.peer.pin, sock.own_pin
        self._tls = sock
        self._guard = threading.Lock()
        self._ahead = memoryview(b"")  # decrypted, and not asked for yet
        self._ended: PeerLostError | None = None
        self._error = 0

    def poll(self, timeout: float | None = 0.0) -> bool:
        """See `Channel.poll`. Bytes on the wire are not enough: only some that TLS has found genuine begin a frame."""
        self._require_usable(None)
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (self._ahead or self._read_ahead()):
            left = None if deadline is None else 1000 * max(0.0, deadline - time.monotonic())
            if not self._readable.poll(left):
                return False
        return True

    def close(self) -> None:
        """See `Channel.close`.

        TLS's own farewell is left out: a peer that is done says `Goodbye`, a frame knows its length, and Python's way to
        say it leaves errors behind that OpenSSL then finds in this thread's next connection.
        """
        with self._guard:
            super().close()

    def _send_pieces(self, pieces: Iterable[memoryview]) -> None:
        with self._tls_errors():
            for piece in _gathered(pieces):
                left = piece
                while left:
                    left = left[self._do(self._tls.send, left) :]

    def _recv_exactly(self, view: memoryview) -> None:
        with self._tls_errors():
            while view:
                if self._ahead:
                    count = min(len(view), len(self._ahead))
                    view[:count], self._ahead = self._ahead[:count], self._ahead[count:]
                else:
                    if self._ended:
                        raise self._ended
                    count = self._do(self._tls.recv_into, view)
                    if not count:
                        raise self._lost()
                view = view[count:]

    def _read_ahead(self) -> bool:
        """Decrypt what is there, without waiting; whether there was anything, or the end."""
        record = memoryview(bytearray(RECORD_BYTES))
        try:
            with self._tls_errors():
                count = self._now(self._tls.recv_into, record)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except PeerLostError as error:
            if self._closed:
                raise
            self._ended = error
            return True
        self._ahead = record[:count]
        self._ended = None if count else self._lost()
        return True

    def _do(self, call: Callable[[memoryview], int], view: memoryview) -> int:
        """Do something on the connection as soon as that is possible."""
        while True:
            try:
                return self._now(call, view)
            except ssl.SSLWantReadError:
                self._wait(self._readable)
            except ssl.SSLWantWriteError:
                self._wait(self._writable)

    def _now(self, call: Callable[[memoryview], int], view: memoryview) -> int:
        with self._guard:
            self._require_usable(None)  # a TLS socket that was closed would turn into a plain one
            # Python takes every failure beneath TLS for the peer's end, so what it was is asked for before.
            self._error = self._tls.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or self._error
            return call(view)

    def _lost(self, how: str = "closed its link") -> PeerLostError:
        return self._unreached(self._error) if self._error in UNREACHABLE else super()._lost(how)

    @contextmanager
    def _tls_errors(self) -> Generator[None]:
        """Turn OpenSSL's ways to say that the peer is gone, or that the wire was tampered with, into ours."""
        try:
            with self._peer_errors():
                yield
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            raise self._lost() from error
        except ssl.SSLError as error:
            self._recv_fault = self._send_fault = f"TLS failed ({error.reason})"
            raise ProtocolError(
                f"the link to the {self.peer} was disturbed: {error.reason}",
                hint="the network, or somebody in it, altered what crossed: start again, over another network if it recurs",
            ) from error


def _gathered(pieces: Iterable[memoryview]) -> Generator[memoryview]:
    """The same bytes, with small pieces that follow one another joined: each would cost a record and a system call."""
    small = bytearray()
    for piece in pieces:
        if len(small) + len(piece) <= RECORD_BYTES:
            small += piece
            continue
        if small:
            yield memoryview(small)
            small = bytearray()
        yield piece
    if small:
        yield memoryview(small)
