"""A party as a long-running service: it listens, and serves every peer that proves itself in a session of its own.

Under designs that cut the model, a role's service is made once and serves owners beside one another. Under designs with an
enclave, a session is a meeting of links (`meetings`). How peers prove themselves is `dialling`'s.

*Bounds.* At most `MAX_HANDSHAKES` connections prove themselves at a time, each for `HANDSHAKE_SECONDS` at most; more are
closed unread. So strangers cost a service a bounded number of threads and no memory. Of those that are proven at most `MAX_LINKS`
are open, and what each says first is short. Whoever sends faster than it is read waits: a link holds one message at a time.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

from veiltune.config import Config
from veiltune.designs import DESIGNS
from veiltune.errors import ConfigError, PeerLostError, ProtocolError, VeiltuneError
from veiltune.parties.party import Job, Party
from veiltune.session.dialling import dial, is_exposed, party_handshake, read_token, require_dialled
from veiltune.session.health import Health, HealthServer
from veiltune.session.meetings import Meetings
from veiltune.session.party_main import design_options
from veiltune.session.wiring import channel_options, party_directory
from veiltune.transport.channel import Channel, memory_pair
from veiltune.transport.messages import Progress
from veiltune.transport.one_machine import open_channel
from veiltune.transport.secure import SecureSocket
from veiltune.transport.stream import HANDSHAKE_SECONDS, NamedSocket, parse_address, shake_hands
from veiltune.transport.transcript import Meter

__all__ = ["Service", "dial", "parse_address", "party_handshake", "read_token"]

log = logging.getLogger(__name__)
OnEvent = Callable[[str, dict[str, Any]], None]
Serve = Callable[[Channel], bool | None]
POLL_SECONDS = 0.2
MAX_HANDSHAKES = 32
MAX_LINKS = 256
FIRST_PAYLOAD_BYTES = 1 << 20
"""Of a link's first message, which says what the link is for."""
_BACKLOG = 16
_GUARDS = {
    "keys": "TLS, for the keys in [[peers]]",
    "token": "the session token is the only thing that guards it",
    "exposed": "WARNING: reachable from other machines, NOTHING IS ENCRYPTED, the session token is all that guards it",
}


class Service:
    """One role of one design, listening.

    Args:
        config: its own configuration; ``output`` is where it keeps its state.
        role: which.
        address: where to listen; port 0 takes a free one.
        on_event: told of progress, of sessions and of refusals.

    Raises:
        ConfigError: the role cannot be a service, a key, token or address is wrong, or it would listen beyond this machine
            with nothing but a token.
    """

    def __init__(self, config: Config, role: str, address: tuple[str, int], on_event: OnEvent) -> None:
        design = DESIGNS[config.design]
        if role not in design.can_serve:
            raise ConfigError(
                f"{design.name} has no {role!r} that runs as a service",
                hint=f"it has: {', '.join(design.can_serve) or 'none'}",
            )
        if config.session.record:
            raise ConfigError(
                f"session.record = {list(config.session.record)!r}: a service records no transcript",
                hint="leave it out here, and record a run whose parties are started by tune",
            )
        self.config = config
        self.role = role
        self.design = design
        self.meter = Meter(role)
        self.health = Health(role, design.name, self.meter)
        self._tell = on_event
        self._comers = design.is_dialled_by(role)
        exposed = is_exposed(config, address[0])
        self._guarded_by = _GUARDS["keys" if config.identity.key else "exposed" if exposed else "token"]
        self._handshake = party_handshake(config, role, self._comers, listening=True)
        require_dialled(config, design, role)
        self._handshakes = threading.BoundedSemaphore(MAX_HANDSHAKES)
        self._stopping = threading.Event()
        self._links: set[Channel] = set()
        self._guard = threading.Lock()
        self._meetings: Meetings | None = None
        if role in design.by_session:
            self._meetings = Meetings(config, role, design, self.meter, self._control)
        self._listener = self._bind(address)
        try:
            where = config.session.health
            self._health_server = None if where is None else HealthServer(self.health, where)
        except ConfigError:
            self._listener.close()
            raise
        host, port = self._listener.getsockname()[:2]
        self.address = f"{host}:{port}"

    def on_event(self, event: str, fields: dict[str, Any]) -> None:
        """Count an event, and pass it on."""
        self.health.count(event)
        self._tell(event, fields)

    def _bind(self, address: tuple[str, int]) -> socket.socket:
        """Take the address now; whoever comes before `run` listens is turned away, and tries again."""
        host, port = address
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
        except OSError as error:
            sock.close()
            raise ConfigError(
                f"cannot listen at {host}:{port}: {error.strerror or error}", hint="choose another --listen"
            ) from None
        return sock

    def run(self) -> None:
        """Load, then serve until `stop`; then let an open session save, for at most ``session.stop_seconds``.

        Raises:
            VeiltuneError: what the role cannot start for.
        """
        if self._health_server is not None:
            self._health_server.start()
        try:
            serve: Serve = (
                self.design.services[self.role](self._party()) if self._meetings is None else self._meetings.serve
            )
            self._listener.listen(_BACKLOG)
            where = {} if self._health_server is None else {"health": self._health_server.address}
            self.on_event("listening", {"address": self.address, "guard": self._guarded_by, **where})
            self.health.is_ready = True
            self._accept(serve)
        finally:
            self.health.is_ready = False
            self._stopping.set()
            self._listener.close()
            if self._meetings is not None:
                self._meetings.stop(self.config.session.stop_seconds)
            with self._guard:
                links = list(self._links)
            for link in links:
                link.close()
            if self._health_server is not None:
                self._health_server.stop()

    def stop(self) -> None:
        """Take no more sessions, and end those that are open."""
        self._stopping.set()

    def _accept(self, serve: Serve) -> None:
        self._listener.settimeout(POLL_SECONDS)
        while not self._stopping.is_set():
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            if not self._handshakes.acquire(blocking=False):
                sock.close()
                self.on_event("turned_away", {"why": f"{MAX_HANDSHAKES} connections are proving themselves already"})
                continue
            threading.Thread(target=self._session, args=(sock, serve), daemon=True).start()

    def _prove(self, sock: socket.socket) -> socket.socket | None:
        try:
            return shake_hands(sock, self._handshake, HANDSHAKE_SECONDS)
        except ProtocolError as error:
            without = self.config.identity.key is None
            self.on_event("turned_away", {"why": "it does not hold this session's token" if without else error.message})
            return None
        finally:
            self._handshakes.release()

    def _admit(self, proven: socket.socket) -> Channel | None:
        """A channel to whoever proved itself, if there is room for one more."""
        peer = self._comers[0]
        if isinstance(proven, SecureSocket):
            peer = proven.peer.role
        elif isinstance(proven, NamedSocket):
            peer = proven.role
        options = channel_options(self.design, self.role, peer, (self.meter,))
        options["first_payload_bytes"] = FIRST_PAYLOAD_BYTES
        link = open_channel(proven, self.role, peer, **options)
        with self._guard:
            is_full = len(self._links) >= MAX_LINKS
            if not is_full:
                self._links.add(link)
            # It may have come as the service ended, which has closed its links or will not see this one.
            if is_full or self._stopping.is_set():
                link.close()
        if is_full:
            self.on_event("turned_away", {"why": f"{MAX_LINKS} links are open already"})
        return None if is_full else link

    def _session(self, sock: socket.socket, serve: Serve) -> None:
        proven = self._prove(sock)
        link = None if proven is None else self._admit(proven)
        if link is None:
            return
        try:
            with self.health.session():
                if serve(link) is not False:
                    self.on_event("session_ended", {})
        except PeerLostError as error:
            self.on_event("owner_gone", {"why": error.message})
        except VeiltuneError as error:
            self.on_event("refused", {"why": error.message})
        except Exception as error:
            log.exception("internal error in a session")
            self.on_event("refused", {"why": f"internal error: {type(error).__name__}"})
        finally:
            with self._guard:
                self._links.discard(link)
            link.close()

    def _party(self) -> Party:
        """This role, with nobody linked yet; what it reports goes to ``on_event``."""
        directory = party_directory(self.config, self.role)
        directory.mkdir(parents=True, exist_ok=True)
        options = design_options(self.design, self.config.design_options)
        return Party(self.role, self.config, options, Job(verb="tune"), {}, self._control(), self.meter, directory)

    def _control(self) -> Channel:
        """A party's link to its supervisor, which is this service."""
        mine, theirs = memory_pair("supervisor", self.role)
        threading.Thread(target=self._forward, args=(mine,), daemon=True).start()
        return theirs

    def _forward(self, control: Channel) -> None:
        try:
            while True:
                message = control.recv()
                # An engine that is ready is a session's business; a trunk that is ready is the service's.
                if isinstance(message, Progress) and not (self._meetings is not None and message.event == "ready"):
                    self.on_event(message.event, dict(message.fields))
        except (PeerLostError, ProtocolError):
            return
