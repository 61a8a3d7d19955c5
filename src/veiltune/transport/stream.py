"""Frames over a stream socket (TCP, or a socket pair), and how two processes come to share an authenticated one."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import select
import socket
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Unpack

from veiltune.errors import ConfigError, PeerLostError, ProtocolError
from veiltune.transport.channel import Channel, ChannelOptions
from veiltune.transport.frame import PREAMBLE_BYTES, Frame, read_preamble

TOKEN_BYTES = 32
LOOPBACK = "127.0.0.1"
HANDSHAKE_SECONDS = 10.0
_MAX_PIECES = 512  # the operating system takes at most IOV_MAX (1024 on Linux) pieces a call
_SOCKET_BUFFER_BYTES = 4 << 20
_LONGEST_PAUSE_SECONDS = 2.0
_SILENCE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 140_000}
"""A machine that is silent for 140 s counts as gone: while nothing is said (60 + 4 x 20), and while what was said is not
acknowledged (in ms), which would be 15 minutes otherwise and keeps the questions of the former from being asked."""

Handshake = Callable[[socket.socket], socket.socket | None]
"""Proves both ends to one another on a fresh connection, or raises `ProtocolError`. It may take as long as the socket's
timeout says. It returns the socket to go on with if that is another one, which then owns the connection: `secure`."""


class SocketChannel(Channel):
    """Frames over a connected stream socket, which the channel then owns. Waiting is passive: an idle end uses no CPU.

    The peer counts as lost when the last copy of its socket is closed: a process that hands a socket to a child must
    close its own copy.

    Args:
        sock: a connected stream socket.
        me: the party at this end.
        peer: the party at the other end.
        options: see `ChannelOptions`.
    """

    def __init__(self, sock: socket.socket, me: str, peer: str, **options: Unpack[ChannelOptions]) -> None:
        super().__init__(me, peer, **options)
        if not _send_at_once(sock):  # TCP sizes its buffers by itself, and better
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
        sock.setblocking(False)
        self._sock = sock
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable.register(sock, select.POLLOUT)

    def poll(self, timeout: float | None = 0.0) -> bool:
        """See `Channel.poll`."""
        self._require_usable(None)
        return bool(self._readable.poll(None if timeout is None else 1000 * timeout))

    def close(self) -> None:
        """See `Channel.close`."""
        if not self._closed:
            self._closed = True
            self._sock.close()

    def abort(self) -> None:
        """Have whoever waits at either end find the link lost. From any thread; closing alone wakes nobody here."""
        with suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # the connection's own, beneath TLS

    def _send_frame(self, frame: Frame) -> None:
        self._send_pieces((memoryview(frame.head), *frame.segments))

    def _recv_head(self) -> bytes:
        preamble = bytearray(PREAMBLE_BYTES)
        self._recv_exactly(memoryview(preamble))
        header_bytes, _ = read_preamble(memoryview(preamble), self._recv_limit)
        head = preamble + bytes(header_bytes)
        self._recv_exactly(memoryview(head)[PREAMBLE_BYTES:])
        return bytes(head)

    def _recv_payload(self, segments: list[memoryview], num_bytes: int) -> None:  # noqa: ARG002
        for segment in segments:
            self._recv_exactly(segment)

    def _send_pieces(self, pieces: Iterable[memoryview]) -> None:
        left = list(pieces)
        with self._peer_errors():
            while left:
                try:
                    sent = self._sock.sendmsg(left[:_MAX_PIECES])
                except BlockingIOError:
                    self._wait(self._writable)
                    continue
                done = 0
                while done < len(left) and sent >= len(left[done]):
                    sent -= len(left[done])
                    done += 1
                del left[:done]
                if sent:
                    left[0] = left[0][sent:]

    def _recv_exactly(self, view: memoryview) -> None:
        with self._peer_errors():
            while view:
                try:
                    received = self._sock.recv_into(view)
                except BlockingIOError:
                    self._wait(self._readable)
                    continue
                if not received:
                    raise self._lost()
                view = view[received:]

    def _wait(self, poller: select.poll) -> None:
        if not poller.poll(1000 * self._stall_seconds):
            raise self._lost(f"made no progress for {self._stall_seconds:g} s in the middle of a message")


# --- two processes meet -----------------------------------------------------------------------------------------------


def listen_loopback(port: int = 0, host: str = LOOPBACK) -> socket.socket:
    """A listening TCP socket, by default reachable from this machine only. ``getsockname()[1]`` tells its port."""
    return socket.create_server((host, port), backlog=16)


def accept(listener: socket.socket, handshake: Handshake, timeout: float = 60.0) -> socket.socket:
    """Wait for the peer that can complete the handshake. Others are turned away and do not end the wait.

    Raises:
        PeerLostError: nobody proved itself within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    refused, why = 0, ""
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            break
        try:
            return shake_hands(sock, handshake, min(HANDSHAKE_SECONDS, max(0.1, deadline - time.monotonic())))
        except ProtocolError as error:
            refused, why = refused + 1, f", the last because {error.message}"
    raise PeerLostError(
        f"no peer connected within {timeout:g} s ({refused} turned away{why})",
        hint="start the other party with the same session",
    )


def is_loopback(host: str) -> bool:
    """Whether an address never leaves this machine. A name that is none of this machine's own counts as leaving it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` in two.

    Raises:
        ConfigError: it is not of that form.
    """
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{text!r} is no address", hint="give HOST:PORT, for example 127.0.0.1:7431")
    return host.strip("[]"), int(port)


def connect(host: str, port: int, handshake: Handshake, timeout: float = 60.0) -> socket.socket:
    """Connect to a listener, which need not be up yet, and complete the handshake.

    Raises:
        PeerLostError: nothing listens there within ``timeout`` seconds.
        ProtocolError: whoever listens there does not belong to this session.
    """
    deadline = time.monotonic() + timeout
    pause = 0.05
    while True:
        try:
            sock = socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic()))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerLostError(
                    f"nothing listens at {host}:{port} after {timeout:g} s", hint="is the other party up?"
                ) from error
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    try:
        return shake_hands(sock, handshake, HANDSHAKE_SECONDS)
    except ProtocolError as error:
        raise ProtocolError(
            f"{host}:{port} did not prove that it belongs to this session: {error.message}",
            hint=error.hint or "same session token?",
        ) from error


class NamedSocket(socket.socket):
    """A connection whose other end said, under the session's token, which party it is.

    Attributes:
        role: the party.
    """

    role: str


def token_handshake(token: bytes, *, listening: bool, names: Collection[str] = ()) -> Handshake:
    """A handshake in which both ends prove that they hold a session's token, and neither shows it.

    Each sends 32 random bytes; then the connecting end, and only if that is right the listening end, sends
    HMAC-SHA256(token, side ‖ listener's bytes ‖ connector's bytes). The side keeps a proof from being reflected. This
    authenticates the two ends of one connection, not the frames after it: a network needs a secure channel besides.

    Where several parties may come, the connecting end's proof covers its own name, and the listening end finds out which of
    ``names`` it was: it gets a `NamedSocket`. Whoever has the token may use any name; only keys tell parties apart.

    Args:
        token: 32 bytes that only this session's parties know.
        listening: whether this end accepted the connection.
        names: the connecting end's own, or those that the listening end takes; empty: there is but one party that may come.

    Raises:
        ValueError: the token is not 32 bytes.
    """
    if len(token) != TOKEN_BYTES:
        raise ValueError(f"a session token has {TOKEN_BYTES} bytes, not {len(token)}")

    def prove(side: str, nonces: bytes) -> bytes:
        return hmac.digest(token, f"veiltune link 1 {side}".encode() + nonces, hashlib.sha256)

    sides = [f"connect {name} " for name in names] or ["connect"]

    def handshake(sock: socket.socket) -> socket.socket | None:
        deadline = handshake_deadline(sock)
        mine = secrets.token_bytes(TOKEN_BYTES)
        sock.sendall(mine)
        theirs = read_exactly(sock, TOKEN_BYTES, deadline)
        nonces = mine + theirs if listening else theirs + mine
        if not listening:
            sock.sendall(prove(sides[0], nonces))
        proof = read_exactly(sock, TOKEN_BYTES, deadline)
        wanted = [prove(side, nonces) for side in sides] if listening else [prove("listen", nonces)]
        right = [hmac.compare_digest(proof, each) for each in wanted]
        if not any(right):
            raise ProtocolError("the peer does not hold this session's token")
        if not listening:
            return None
        sock.sendall(prove("listen", nonces))
        return _named(sock, list(names)[right.index(True)]) if names else None

    return handshake


def _named(sock: socket.socket, role: str) -> NamedSocket:
    seconds = sock.gettimeout()
    named = NamedSocket(sock.family, sock.type, sock.proto, fileno=sock.detach())
    named.settimeout(seconds)
    named.role = role
    return named


def shake_hands(sock: socket.socket, handshake: Handshake, seconds: float) -> socket.socket:
    """Run the handshake on a fresh connection, within that many seconds, and return the socket to go on with.

    Raises:
        ProtocolError: it failed; the connection is closed.
    """
    try:
        sock.settimeout(seconds)
        _send_at_once(sock)
        return handshake(sock) or sock
    except OSError as error:
        sock.close()
        how = f"it took longer than {seconds:g} s" if isinstance(error, TimeoutError) else "the connection broke"
        raise ProtocolError(f"the handshake failed: {how}") from error
    except BaseException:
        sock.close()
        raise


def _send_at_once(sock: socket.socket) -> bool:
    """Let no small write wait for the answer to the one before it, and notice a peer that is silent for good.

    False if it is no TCP socket, where no write waits and no peer can vanish.
    """
    is_tcp = sock.family in (socket.AF_INET, socket.AF_INET6)
    if is_tcp:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that vanished says no farewell
        for option, value in _SILENCE.items():
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return is_tcp


def handshake_deadline(sock: socket.socket) -> float:
    """When a handshake that begins now must be over, by the socket's timeout: a peer that trickles bytes gains no time."""
    return time.monotonic() + (HANDSHAKE_SECONDS if (seconds := sock.gettimeout()) is None else seconds)


def read_exactly(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    """That many bytes of a handshake.

    Raises:
        ProtocolError: the peer closed the connection.
        TimeoutError: they did not come before the deadline.
    """
    data = b""
    while len(data) < num_bytes:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        piece = sock.recv(num_bytes - len(data))
        if not piece:
            raise ProtocolError("the peer closed the connection during the handshake")
        data += piece
        if time.monotonic() > deadline:
            raise TimeoutError
    return data
