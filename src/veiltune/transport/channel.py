"""The one seam between parties: whatever they tell one another becomes bytes here, in-process twin included.

`Channel` holds everything but the wire: what may be sent and received, encoding and decoding, and the observers that
count and record what really crossed. A wire is a few methods that move frames. `memory_pair` is the in-process wire:
the same bytes, through the same codec. `stream.SocketChannel` and `shared_memory.SharedMemoryChannel` are the others.
"""

from __future__ import annotations

import errno
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Protocol, Self, TypedDict, TypeVar, Unpack

from veiltune.errors import PeerLostError, ProtocolError, nearest
from veiltune.transport.codec import Incoming, Registry, encode
from veiltune.transport.frame import MAX_PAYLOAD_BYTES, PREAMBLE_BYTES, Frame, read_preamble
from veiltune.transport.messages import MESSAGES, Message

STALL_SECONDS = 300.0
UNREACHABLE = frozenset(
    {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.EHOSTDOWN}
)
"""What the operating system says of a link whose network, or whose peer's machine, is gone."""

M = TypeVar("M", bound=Message)


class Observer(Protocol):
    """Sees each whole frame at one end of a link, once it was sent or received. It must not keep the frame's memory."""

    def sent(self, peer: str, kind: str, frame: Frame) -> None:
        """A frame went to ``peer``."""
        ...

    def received(self, peer: str, kind: str, frame: Frame) -> None:
        """A frame came from ``peer``."""
        ...


class ChannelOptions(TypedDict, total=False):
    """What every channel can be given beside its wire.

    Attributes:
        may_send: kinds that may go out; None: all of the registry.
        may_receive: kinds that may come in; None: all of the registry.
        observers: told of each frame (`Meter`, `Transcript`).
        registry: the message classes, by kind.
        max_payload_bytes: the longest payload, both ways.
        first_payload_bytes: the longest payload of the first frame that comes in, from a peer with whom nothing was agreed yet.
        stall_seconds: how long a peer may make no progress in the middle of a frame before it counts as lost.
    """

    may_send: frozenset[str] | None
    may_receive: frozenset[str] | None
    observers: Sequence[Observer]
    registry: Registry
    max_payload_bytes: int
    first_payload_bytes: int
    stall_seconds: float


class Channel(ABC):
    """One end of a link between two parties. One thread may send while another receives; no more than one of each.

    An error in the middle of a frame leaves that direction out of step, so it refuses further use; the other goes on.

    Args:
        me: the party at this end.
        peer: the party at the other end.
        options: see `ChannelOptions`.
    """

    def __init__(self, me: str, peer: str, **options: Unpack[ChannelOptions]) -> None:
        self.me = me
        self.peer = peer
        self._may_send = options.get("may_send")
        self._may_receive = options.get("may_receive")
        self._observers = tuple(options.get("observers", ()))
        self._registry = options.get("registry", MESSAGES)
        self._max_payload_bytes = options.get("max_payload_bytes", MAX_PAYLOAD_BYTES)
        self._recv_limit = min(options.get("first_payload_bytes", self._max_payload_bytes), self._max_payload_bytes)
        self._stall_seconds = options.get("stall_seconds", STALL_SECONDS)
        self._send_fault: str | None = None
        self._recv_fault: str | None = None
        self._closed = False

    # --- the wire, which a subclass supplies --------------------------------------------------------------------------

    @abstractmethod
    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether a frame begins, or the peer goes, within ``timeout`` seconds (None: wait for it)."""

    @abstractmethod
    def close(self) -> None:
        """Close this end. What was sent can still be received. May be called again."""

    @abstractmethod
    def _send_frame(self, frame: Frame) -> None:
        """Send a frame whole, waiting for room."""

    @abstractmethod
    def _recv_head(self) -> bytes:
        """Receive the next frame's preamble and header."""

    @abstractmethod
    def _recv_payload(self, segments: list[memoryview], num_bytes: int) -> None:
        """Receive that frame's payload, of ``num_bytes`` in all, into ``segments``."""

    # --- what every wire has in common --------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Send a message. Its tensors may change as soon as this returns.

        Raises:
            ProtocolError: this kind may not go to the peer; nothing was sent.
            FrameError: the message cannot be encoded; nothing was sent.
            PeerLostError: the peer is gone or reads nothing.
        """
        kind = type(message).__name__
        if self._registry.get(kind) is not type(message):
            raise ProtocolError(f"{kind} is not a message of this protocol", hint=nearest(kind, self._registry))
        if self._may_send is not None and kind not in self._may_send:
            raise ProtocolError(f"the {self.me} may not send {kind} to the {self.peer}")
        self._require_usable(self._send_fault)
        frame = encode(message)
        if frame.payload_bytes > self._max_payload_bytes:
            raise ProtocolError(f"{kind}: {frame.payload_bytes} payload bytes exceed {self._max_payload_bytes}")
        try:
            self._send_frame(frame)
        except BaseException as error:
            self._send_fault = f"sending {kind} failed ({type(error).__name__})"
            raise
        for observer in self._observers:
            observer.sent(self.peer, kind, frame)

    def recv(self, timeout: float | None = None) -> Message:
        """Receive the next message.

        Args:
            timeout: seconds to wait for it to begin; None: as long as the peer lives.

        Raises:
            PeerLostError: the peer is gone, sent nothing in time (nothing was consumed then), or stalled.
            ProtocolError: this kind may not come from the peer.
            FrameError: the bytes are no well-formed frame.
        """
        self._require_usable(self._recv_fault)
        if not self.poll(timeout):
            raise PeerLostError(f"the {self.peer} sent nothing within {timeout:g} s")
        try:
            incoming = self._open()
            self._recv_payload(incoming.allocate(), incoming.payload_bytes)
            message = incoming.message()
        except BaseException as error:
            self._recv_fault = f"an earlier receipt failed ({type(error).__name__})"
            if isinstance(error, ProtocolError):
                raise type(error)(f"from the {self.peer}: {error.message}", hint=error.hint) from error
            raise
        self._recv_limit = self._max_payload_bytes
        if self._observers:
            frame = incoming.frame()
            for observer in self._observers:
                observer.received(self.peer, incoming.kind, frame)
        return message

    def recv_as(self, type_: type[M], timeout: float | None = None) -> M:
        """As `recv`, for the one kind that may come next.

        Raises:
            ProtocolError: another kind came (it is consumed).
        """
        message = self.recv(timeout)
        if not isinstance(message, type_):
            raise ProtocolError(f"expected {type_.__name__} from the {self.peer}, got {type(message).__name__}")
        return message

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.me!r} to {self.peer!r}{', closed' if self._closed else ''})"

    def _open(self) -> Incoming:
        incoming = Incoming(self._recv_head(), self._registry, max_payload_bytes=self._recv_limit)
        if self._may_receive is not None and incoming.kind not in self._may_receive:
            raise ProtocolError(f"the {self.me} may not receive {incoming.kind}")
        return incoming

    def _require_usable(self, fault: str | None) -> None:
        if self._closed:
            raise PeerLostError(f"the link to the {self.peer} was closed at this end")
        if fault is not None:
            raise ProtocolError(f"the link to the {self.peer} is out of step: {fault}")

    def _lost(self, how: str = "closed its link") -> PeerLostError:
        return PeerLostError(f"the {self.peer} {how}", hint=f"see why the {self.peer} stopped")

    def _unreached(self, code: int) -> PeerLostError:
        return PeerLostError(
            f"the {self.peer} is not reached any more ({os.strerror(code)})",
            hint=f"see whether the network and the {self.peer}'s machine are up",
        )

    @contextmanager
    def _peer_errors(self) -> Generator[None]:
        """Turn the operating system's ways to say that the peer is gone into ours."""
        try:
            yield
        except ConnectionError as error:
            raise self._lost() from error
        except OSError as error:
            if self._closed:  # by another thread, while it was in use
                raise PeerLostError(f"the link to the {self.peer} was closed at this end") from error
            if error.errno not in UNREACHABLE:
                raise
            raise self._unreached(error.errno) from error


# --- the in-process wire ----------------------------------------------------------------------------------------------


class _Pipe:
    """One direction: whole frames in order, and whether either end has closed."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.changed = threading.Condition()
        self.closed = False

    def put(self, frame: bytes) -> bool:
        with self.changed:
            if not self.closed:
                self.frames.append(frame)
            self.changed.notify_all()
            return not self.closed

    def is_ready(self) -> bool:
        return bool(self.frames) or self.closed

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class MemoryChannel(Channel):
    """The in-process wire. A send never waits, so one thread may play both parties. Made by `memory_pair`."""

    def __init__(self, outward: _Pipe, inward: _Pipe, me: str, peer: str, **options: Unpack[ChannelOptions]) -> None:
        super().__init__(me, peer, **options)
        self._outward = outward
        self._inward = inward
        self._arrived = memoryview(b"")

    def poll(self, timeout: float | None = 0.0) -> bool:
        """See `Channel.poll`."""
        with self._inward.changed:
            return self._inward.changed.wait_for(self._inward.is_ready, timeout)

    def close(self) -> None:
        """See `Channel.close`."""
        self._closed = True
        self._outward.close()
        self._inward.close()

    def _send_frame(self, frame: Frame) -> None:
        if not self._outward.put(frame.to_bytes()):
            raise self._lost()

    def _recv_head(self) -> bytes:
        with self._inward.changed:
            if not self._inward.frames:
                raise self._lost()
            frame = memoryview(self._inward.frames.popleft())
        header_bytes, _ = read_preamble(frame[:PREAMBLE_BYTES], self._recv_limit)
        self._arrived = frame[PREAMBLE_BYTES + header_bytes :]
        return bytes(frame[: PREAMBLE_BYTES + header_bytes])

    def _recv_payload(self, segments: list[memoryview], num_bytes: int) -> None:
        rest, self._arrived = self._arrived[:num_bytes], memoryview(b"")
        for segment in segments:
            segment[:] = rest[: len(segment)]
            rest = rest[len(segment) :]


def memory_pair(
    a: str, b: str, *, a_options: ChannelOptions | None = None, b_options: ChannelOptions | None = None
) -> tuple[MemoryChannel, MemoryChannel]:
    """Two linked ends in this process: the one that ``a`` holds, whose peer is ``b``, and the other."""
    forth, back = _Pipe(), _Pipe()
    return (
        MemoryChannel(forth, back, a, b, **(a_options or {})),
        MemoryChannel(back, forth, b, a, **(b_options or {})),
    )
