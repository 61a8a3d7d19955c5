"""A link of a session with a party that runs as a service: it hears refusals, and that the peer is being stopped.

Both may come at any moment, in the place of an answer or before it, so they are taken out of the stream here: roles see
only the messages that they see among processes of one machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from veiltune import errors
from veiltune.errors import PeerLostError, ProtocolError, VeiltuneError
from veiltune.transport.channel import Channel
from veiltune.transport.frame import Frame
from veiltune.transport.messages import Message, Refused, StopSoon
from veiltune.transport.stream import SocketChannel

DRAIN_SECONDS = 2.0


class SessionLink(Channel):
    """A channel that carries the same messages over another one, which it then owns.

    Args:
        wire: the channel to the peer.

    Attributes:
        stopping: the peer is being stopped, and asks to save at the end of this step.
        on_stopping: told of that, once.
        is_waiting: a thread waits here for the peer's next message.
    """

    def __init__(self, wire: Channel) -> None:
        super().__init__(wire.me, wire.peer)
        self.wire = wire
        self.stopping = False
        self.on_stopping: Callable[[], None] = lambda: None
        self._is_to_tell = threading.Event()
        self._told = False
        self.is_waiting = False

    @property
    def pin(self) -> str:
        """The name of the peer's key; empty where there are no keys."""
        return getattr(self.wire, "peer_pin", "")

    def tell_to_stop(self) -> None:
        """Have the peer learn, with the next answer that it gets, that this party is being stopped."""
        self._is_to_tell.set()

    def send(self, message: Message) -> None:
        """See `Channel.send`."""
        self.wire.send(message)
        if self._is_to_tell.is_set() and not self._told:
            self._told = True
            self.wire.send(StopSoon())

    def recv(self, timeout: float | None = None) -> Message:
        """See `Channel.recv`.

        Raises:
            VeiltuneError: the peer ends the session, in its own words; of the same kind as its own error.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self.is_waiting = True
            try:
                message = self.wire.recv(left)
            finally:
                self.is_waiting = False
            if isinstance(message, Refused):
                raise refusal(self.peer, message)
            if not isinstance(message, StopSoon):
                return message
            if not self.stopping:
                self.stopping = True
                self.on_stopping()

    def poll(self, timeout: float | None = 0.0) -> bool:
        """See `Channel.poll`."""
        return self.wire.poll(timeout)

    def close(self) -> None:
        """See `Channel.close`."""
        self._closed = True
        self.wire.close()

    def abort(self) -> None:
        """Have whoever waits at either end find the link lost. From any thread."""
        if isinstance(self.wire, SocketChannel):
            self.wire.abort()

    def refuse(self, error: VeiltuneError) -> None:
        """Tell the peer why this party ends the session, if it can still be told."""
        try:
            self.wire.send(Refused(type(error).__name__, error.message, error.hint))
        except (PeerLostError, ProtocolError):
            return

    def drain(self) -> None:
        """Take what the peer still sends until it has gone, for a moment: a link that is closed over it loses the refusal."""
        deadline = time.monotonic() + DRAIN_SECONDS
        try:
            while (left := deadline - time.monotonic()) > 0:
                self.wire.recv(left)
        except (PeerLostError, ProtocolError):
            return

    def _send_frame(self, frame: Frame) -> None:
        raise NotImplementedError("frames are the wire's")

    def _recv_head(self) -> bytes:
        raise NotImplementedError("frames are the wire's")

    def _recv_payload(self, segments: list[memoryview], num_bytes: int) -> None:
        raise NotImplementedError("frames are the wire's")


def refusal(peer: str, message: Refused) -> VeiltuneError:
    """A peer's refusal as an error of the same kind; of a kind that is none of ours, a ProtocolError."""
    kind = getattr(errors, message.error, None)
    if not (isinstance(kind, type) and issubclass(kind, VeiltuneError)):
        kind = ProtocolError
    return kind(f"the {peer} ended the session: {message.message}", hint=message.hint)
