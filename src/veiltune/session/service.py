"""A party as a long-running service: it listens, and serves every peer that proves itself in a session of its own.

With ``identity.key`` and ``[[peers]]``, both ends prove their keys and agree on the configuration over TLS 1.3. Without,
both hold a session token, a file that one of them makes. It authenticates the two ends of a connection and encrypts nothing,
so a service listens on loopback unless it is told otherwise.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veiltune.config import Config
from veiltune.designs import DESIGNS, Design
from veiltune.errors import ConfigError, PeerLostError, ProtocolError, VeiltuneError, nearest
from veiltune.parties.party import Job, Party
from veiltune.peers import require_peers
from veiltune.session.party_main import design_options
from veiltune.transport.channel import Channel, ChannelOptions, memory_pair
from veiltune.transport.identity import load_identity
from veiltune.transport.messages import Progress
from veiltune.transport.secure import SecureHandshake
from veiltune.transport.secure_channel import open_channel
from veiltune.transport.stream import HANDSHAKE_SECONDS, TOKEN_BYTES, Handshake, connect, shake_hands, token_handshake
from veiltune.transport.transcript import Meter

log = logging.getLogger(__name__)
OnEvent = Callable[[str, dict[str, Any]], None]
POLL_SECONDS = 0.2
_BACKLOG = 16


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` in two.

    Raises:
        ConfigError: it is not of that form.
    """
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{text!r} is no address", hint="give HOST:PORT, for example 127.0.0.1:7431")
    return host.strip("[]"), int(port)


def read_token(path: Path | None, *, create: bool) -> bytes:
    """The session token, in hexadecimal in a file; made, for its owner's eyes only, where that may be.

    Raises:
        ConfigError: no file is named, there is none, or it holds something else.
    """
    if path is None:
        raise ConfigError(
            "session.token_file is not set",
            hint="name the file that holds the session's token; the service makes one if there is none",
        )
    if create and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_bytes(TOKEN_BYTES).hex() + "\n")
    try:
        token = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except FileNotFoundError:
        raise ConfigError(f"no token file {str(path)!r}", hint="copy it from the service that made it") from None
    except (OSError, ValueError):
        token = b""
    if len(token) != TOKEN_BYTES:
        raise ConfigError(f"{str(path)!r} holds no session token", hint="copy it again from the service that made it")
    return token


def party_handshake(config: Config, me: str, peer: str, *, listening: bool) -> Handshake:
    """How two parties prove themselves: by their keys over TLS if ``identity.key`` is set, by the session's token if not.

    Raises:
        ConfigError: the key or the token is wrong, or ``[[peers]]`` has no key for the peer or another one for this party.
    """
    if config.identity.key is None:
        return token_handshake(read_token(config.session.token_file, create=listening), listening=listening)
    identity = load_identity(config.identity.key)
    if identity.role != me:
        raise ConfigError(
            f"identity.key {str(config.identity.key)!r} is the {identity.role}'s, and this is the {me}",
            hint=f"name the key of the {me}; `veiltune keygen {me}` makes one",
        )
    require_peers(config.peers, me, identity.pin, peer)
    accepts, fingerprint = frozenset({peer}), config.fingerprint()
    return SecureHandshake(
        identity=identity, peers=config.peers, accepts=accepts, fingerprint=fingerprint, listening=listening
    )


def dial(config: Config, peer: str, options: ChannelOptions, *, me: str) -> Channel:
    """A link to a party that runs as a service, waiting for it as long as ``session.retry_seconds``.

    Raises:
        ConfigError: the address, the key or the token is wrong.
        PeerLostError: nobody is there.
        ProtocolError: whoever is there has another key, configuration or token.
    """
    host, port = parse_address(config.session.connect[peer])
    handshake = party_handshake(config, me, peer, listening=False)
    try:
        sock = connect(host, port, handshake, config.session.retry_seconds)
    except PeerLostError as error:
        raise PeerLostError(
            f"the {peer} is not to be reached: {error.message}",
            hint=f"start it (`veiltune party {peer} CONFIG`), then go on with --resume",
        ) from None
    return open_channel(sock, me, peer, **options)


def check_connect(config: Config, design: Design) -> None:
    """Refuse a role in ``session.connect`` that is none, or that cannot be a service.

    Raises:
        ConfigError: names the role.
    """
    for role, address in config.session.connect.items():
        if role not in design.services:
            known = ", ".join(design.services) or "none"
            raise ConfigError(
                f"session.connect: {design.name} has no {role!r} that runs as a service (it has: {known})",
                hint=nearest(role, design.services) if design.services else "leave session.connect out",
            )
        parse_address(address)


class Service:
    """One role of one design, listening.

    Args:
        config: its own configuration; ``output`` is where it keeps its state.
        role: which.
        address: where to listen; port 0 takes a free one.
        on_event: told of progress, of sessions and of refusals.

    Raises:
        ConfigError: the role cannot be a service, or the token file is wrong.
    """

    def __init__(self, config: Config, role: str, address: tuple[str, int], on_event: OnEvent) -> None:
        design = DESIGNS[config.design]
        if role not in design.services:
            raise ConfigError(
                f"{design.name} has no {role!r} that runs as a service",
                hint=f"it has: {', '.join(design.services) or 'none'}",
            )
        self.config = config
        self.role = role
        self.design = design
        self.on_event = on_event
        self._handshake = party_handshake(config, role, "owner", listening=True)
        self._stopping = threading.Event()
        self._links: set[Channel] = set()
        self._guard = threading.Lock()
        self._listener = self._bind(address)
        host, port = self._listener.getsockname()[:2]
        self.address = f"{host}:{port}"

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
        """Load, then serve until `stop`.

        Raises:
            VeiltuneError: what the role cannot start for.
        """
        try:
            serve = self.design.services[self.role](self._party())
            self._listener.listen(_BACKLOG)
            by_key = self.config.identity.key is not None
            guard = "TLS, for the keys in [[peers]]" if by_key else "the session token is the only thing that guards it"
            self.on_event("listening", {"address": self.address, "guard": guard})
            self._listener.settimeout(POLL_SECONDS)
            while not self._stopping.is_set():
                try:
                    sock, _ = self._listener.accept()
                except TimeoutError:
                    continue
                threading.Thread(target=self._session, args=(sock, serve), daemon=True).start()
        finally:
            self._stopping.set()
            self._listener.close()
            with self._guard:
                links = list(self._links)
            for link in links:
                link.close()

    def stop(self) -> None:
        """Take no more sessions, and end those that are open."""
        self._stopping.set()

    def _session(self, sock: socket.socket, serve: Callable[[Channel], None]) -> None:
        try:
            sock = shake_hands(sock, self._handshake, HANDSHAKE_SECONDS)
        except ProtocolError as error:
            without = self.config.identity.key is None
            self.on_event("turned_away", {"why": "it does not hold this session's token" if without else error.message})
            return
        received = self.design.may_receive
        options = ChannelOptions(may_send=received("owner"), may_receive=received(self.role))
        link = open_channel(sock, self.role, "owner", **options)
        with self._guard:
            self._links.add(link)
            if (
                self._stopping.is_set()
            ):  # it came as the service ended, which has closed its links or will not see this one
                link.close()
        try:
            serve(link)
            self.on_event("session_ended", {})
        except PeerLostError:
            self.on_event("owner_gone", {})
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
        mine, theirs = memory_pair("supervisor", self.role)
        threading.Thread(target=self._forward, args=(mine,), daemon=True).start()
        directory = Path(self.config.output) / "parties" / self.role
        directory.mkdir(parents=True, exist_ok=True)
        options = design_options(self.design, self.config.design_options)
        return Party(self.role, self.config, options, Job(verb="tune"), {}, theirs, Meter(self.role), directory)

    def _forward(self, control: Channel) -> None:
        try:
            while True:
                message = control.recv()
                if isinstance(message, Progress):
                    self.on_event(message.event, dict(message.fields))
        except (PeerLostError, ProtocolError):
            return
