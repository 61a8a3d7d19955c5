"""How a party finds another that runs as a service, and how the two prove themselves.

With ``identity.key`` and ``[[peers]]``, both ends prove their keys and compare what they agreed on over TLS 1.3. Without, both
hold a session token, a file that one of them makes. It authenticates the two ends of a connection and encrypts nothing, so
beyond this machine it is refused unless ``session.allow_unauthenticated`` says otherwise.

Of two parties that are linked, the first named in the design's ``links`` dials, and the second listens.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection
from pathlib import Path

from veiltune.config import Config
from veiltune.designs import DESIGNS, Design
from veiltune.errors import ConfigError, PeerLostError, nearest
from veiltune.peers import require_peers
from veiltune.transport.channel import Channel, ChannelOptions
from veiltune.transport.identity import load_identity
from veiltune.transport.one_machine import MemoryHandshake, open_channel
from veiltune.transport.secure import SecureHandshake
from veiltune.transport.stream import TOKEN_BYTES, Handshake, connect, is_loopback, parse_address, token_handshake


def is_exposed(config: Config, host: str) -> bool:
    """Whether links with that address leave this machine with nothing but the session token to guard them.

    Raises:
        ConfigError: they would, and that was not allowed.
    """
    if config.identity.key is not None or is_loopback(host):
        return False
    if not config.session.allow_unauthenticated:
        raise ConfigError(
            f"{host!r} is beyond this machine, and no identity.key is set: nothing would be encrypted",
            hint="make keys (`veiltune keygen ROLE`) and set identity.key and [[peers]]; on a network that you trust "
            "wholly, session.allow_unauthenticated = true does without",
        )
    return True


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


def party_handshake(config: Config, me: str, peer: str | Collection[str], *, listening: bool) -> Handshake:
    """How two parties prove themselves: by their keys over TLS if ``identity.key`` is set, by the session's token if not.

    Args:
        config: this party's own.
        me: this party.
        peer: the party that is dialled, or those that may come.
        listening: whether this end accepts connections.

    Raises:
        ConfigError: the key or the token is wrong, or ``[[peers]]`` has no key for a peer or another one for this party.
    """
    peers = frozenset([peer] if isinstance(peer, str) else peer)
    if config.identity.key is None:
        comers = DESIGNS[config.design].is_dialled_by(me if listening else min(peers))
        names = (comers if listening else (me,)) if len(comers) > 1 else ()
        return token_handshake(
            read_token(config.session.token_file, create=listening), listening=listening, names=names
        )
    identity = load_identity(config.identity.key)
    if identity.role != me:
        raise ConfigError(
            f"identity.key {str(config.identity.key)!r} is the {identity.role}'s, and this is the {me}",
            hint=f"name the key of the {me}; `veiltune keygen {me}` makes one",
        )
    for each in sorted(peers):
        require_peers(config.peers, me, identity.pin, each)
    secure = SecureHandshake(
        identity=identity, peers=config.peers, accepts=peers, fingerprint=config.fingerprint(), listening=listening
    )
    design = DESIGNS[config.design]
    one, other = (peers, {me}) if listening else ({me}, peers)
    if design.enclaves and (one, other) == tuple({role} for role in design.data_plane):
        return MemoryHandshake(secure=secure, wanted=config.session.link == "shared_memory")
    return secure


def dial(config: Config, peer: str, options: ChannelOptions, *, me: str) -> Channel:
    """A link to a party that runs as a service, waiting for it as long as ``session.retry_seconds``.

    Raises:
        ConfigError: the address, the key or the token is wrong.
        PeerLostError: nobody is there.
        ProtocolError: whoever is there has another key, configuration or token.
    """
    host, port = parse_address(config.session.connect[peer])
    is_exposed(config, host)
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
    """Refuse a role in ``session.connect`` that is none, or cannot be a service, or is to dial a party that is started here.

    Raises:
        ConfigError: names the role.
    """
    services = config.session.connect
    for role, address in services.items():
        if role not in design.can_serve:
            known = ", ".join(design.can_serve) or "none"
            raise ConfigError(
                f"session.connect: {design.name} has no {role!r} that runs as a service (it has: {known})",
                hint=nearest(role, design.can_serve) if design.can_serve else "leave session.connect out",
            )
        is_exposed(config, parse_address(address)[0])
    for role in design.roles:
        comers = design.is_dialled_by(role)
        remote = [each for each in comers if each in services]
        if role not in services and remote and len(remote) < len(comers):
            raise ConfigError(
                f"session.connect names the {remote[0]}, which links up with the {role}, and not the {role}",
                hint=f'add {role} = "HOST:PORT" to session.connect, and run it as a service too',
            )


def local_roles(config: Config, design: Design) -> tuple[str, ...]:
    """The parties that this machine is to start: neither services, nor parties that only services deal with."""
    services = config.session.connect
    return tuple(
        role
        for role in design.roles
        if role not in services
        and (role == "owner" or not any(each in services for each in design.is_dialled_by(role)))
    )


def require_dialled(config: Config, design: Design, role: str) -> None:
    """Check that a service's configuration has an address for every party that it links up with by itself.

    Raises:
        ConfigError: names the party that lacks one.
    """
    for peer in design.dials(role):
        if peer not in config.session.connect:
            raise ConfigError(
                f"session.connect does not name the {peer}, with which this {role} links up",
                hint=f'add {peer} = "HOST:PORT" to [session.connect]',
            )
        is_exposed(config, parse_address(config.session.connect[peer])[0])
        party_handshake(config, role, peer, listening=False)
