"""Mutual TLS 1.3 between two parties that know one another's keys and agreed on one configuration.

A `SecureHandshake` is a `stream.Handshake`: ``connect(host, port, SecureHandshake(…))`` instead of a token's. What crosses::

    connector → listener    VTS1 | 0 | length | its certificate
    listener → connector    VTS1 | refusal | length | its certificate, or nothing after a refusal
    connector → listener    refusal
    both ways               TLS 1.3; each end's only root is the certificate that the other announced
    connector → listener    VTH1 | configuration's fingerprint | its role | the role it looks for
    listener → connector    the same of the listener | refusal
    connector → listener    refusal

A refusal is one byte, 0 for none. The announcements are in the clear and prove nothing: they let each end look the key up
among its peers before any secret is used, and say plainly what is wrong. TLS then proves that the other end holds that
key, and the certificate in the handshake must be the announced one to the byte. Only the last three lines, within TLS,
make a peer: its key may act in the role that it claims, it looks for this party, and its configuration is ours. Until all
have passed, neither end sends a message of the protocol.

*Reveals*, to whoever sees the wire: who speaks to whom (keys and roles), when and how much.

*Reference*: TLS 1.3 is RFC 8446. No session is resumed and no ticket issued, so each connection has fresh keys.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.serialization import Encoding

from veiltune.errors import ProtocolError
from veiltune.peers import ROLE_PATTERN, PeerConfig, roles_of
from veiltune.transport.identity import MAX_CERTIFICATE_BYTES, Identity, out_of_date, read_certificate
from veiltune.transport.refusals import (
    IN_THE_MIDDLE,
    SAME_CONFIG,
    SAME_VERSION,
    Refusal,
    RefusedPeerError,
    require_none,
    tls_failure,
)
from veiltune.transport.shared_memory import SharedArena
from veiltune.transport.stream import handshake_deadline, read_exactly

_ANNOUNCEMENT: Final = struct.Struct(">4sBH")
_ANNOUNCES: Final = b"VTS1"
_HELLO: Final = struct.Struct(">4s32s16s16s")
_GREETS: Final = b"VTH1"


class Verified(NamedTuple):
    """Who proved to be at the other end.

    Attributes:
        role: the party.
        pin: its key.
    """

    role: str
    pin: str


class SecureSocket(ssl.SSLSocket):
    """A TLS connection that knows who is at its other end; `secure_channel.open_channel` carries frames over it.

    Attributes:
        peer: who proved to be there. Not set before the whole handshake has passed.
        own_pin: the key of this end.
        arenas: written and read by this end, where payloads go through shared memory: `one_machine`.
    """

    peer: Verified
    own_pin: str
    arenas: tuple[SharedArena, SharedArena] | None = None


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureHandshake:
    """Proves this party to a peer and the peer to this party, and makes the connection a `SecureSocket`.

    Attributes:
        identity: this party's own.
        peers: which key may act in which role.
        accepts: the roles that may be at the other end. A connecting end looks for one.
        fingerprint: SHA-256, in hexadecimal, of the configuration that both must have.
        listening: whether this end accepted the connection.
        clock: what time it is, for the dates of certificates.
    """

    identity: Identity
    peers: tuple[PeerConfig, ...]
    accepts: frozenset[str]
    fingerprint: str
    listening: bool
    clock: Callable[[], datetime] = _utc_now

    def __post_init__(self) -> None:
        if len(bytes.fromhex(self.fingerprint)) != 32:
            raise ValueError(f"a fingerprint has 64 hexadecimal digits, not {len(self.fingerprint)}")
        if not self.listening and len(self.accepts) != 1:
            raise ValueError(f"a connecting end looks for one role, not {sorted(self.accepts)}")

    def __call__(self, sock: socket.socket) -> SecureSocket:
        """See `stream.Handshake`. On any failure the connection is closed.

        Raises:
            ProtocolError: the peer refused this end, or is none; `RefusedPeerError` where this end refuses it.
        """
        deadline = handshake_deadline(sock)
        if fault := out_of_date(self.identity.certificate, self.clock()):
            raise ProtocolError(
                f"this {self.identity.role}'s own certificate {fault}",
                hint="set the clock, or renew it: `veiltune keygen --renew`",
            )
        der, roles, pin = (self._announced_to_us if self.listening else self._announce)(sock, deadline)
        tls = self._encrypt(sock, der, deadline)
        with closing_on_failure(tls):
            role = (self._answer if self.listening else self._greet)(tls, roles, deadline)
        tls.peer, tls.own_pin = Verified(role, pin), self.identity.pin
        return tls

    # --- in the clear: who each end says it is ------------------------------------------------------------------------

    def _announce(self, sock: socket.socket, deadline: float) -> tuple[bytes, frozenset[str], str]:
        sock.sendall(self._announcement())
        der = self._read_announcement(sock, deadline)
        try:
            roles, pin = self._judge_certificate(der)
        except RefusedPeerError as error:
            sock.sendall(bytes([error.refusal]))
            raise
        sock.sendall(bytes([Refusal.NONE]))
        return der, roles, pin

    def _announced_to_us(self, sock: socket.socket, deadline: float) -> tuple[bytes, frozenset[str], str]:
        der = self._read_announcement(sock, deadline)
        try:
            roles, pin = self._judge_certificate(der)
        except RefusedPeerError as error:
            sock.sendall(_ANNOUNCEMENT.pack(_ANNOUNCES, error.refusal, 0))
            raise
        sock.sendall(self._announcement())
        self._heed(read_exactly(sock, 1, deadline)[0])
        return der, roles, pin

    def _announcement(self) -> bytes:
        der = self.identity.certificate.public_bytes(Encoding.DER)
        return _ANNOUNCEMENT.pack(_ANNOUNCES, Refusal.NONE, len(der)) + der

    def _read_announcement(self, sock: socket.socket, deadline: float) -> bytes:
        magic, refusal, num_bytes = _ANNOUNCEMENT.unpack(read_exactly(sock, _ANNOUNCEMENT.size, deadline))
        if magic != _ANNOUNCES:
            raise ProtocolError(
                f"what came is no secure channel: it begins with {magic!r}",
                hint="both ends need identity.key and [[peers]] in their configurations, and the same version of Veiltune",
            )
        self._heed(refusal)
        if not 0 < num_bytes <= MAX_CERTIFICATE_BYTES:
            raise ProtocolError(f"the peer announced a certificate of {num_bytes} bytes")
        return read_exactly(sock, num_bytes, deadline)

    def _judge_certificate(self, der: bytes) -> tuple[frozenset[str], str]:
        """The roles among those accepted here that the key of an announced certificate may act in, and its pin."""
        wanted = " or ".join(sorted(self.accepts))
        try:
            certificate, pin = read_certificate(der)
        except ProtocolError as error:
            raise RefusedPeerError(Refusal.MALFORMED, f"the peer: {error.message}") from None
        known = roles_of(self.peers, pin)
        if not known:
            raise RefusedPeerError(
                Refusal.STRANGER,
                f"the peer's key {pin} is not known here",
                hint=f"if it is the {wanted}'s, put it into [[peers]]; if not, {IN_THE_MIDDLE}",
            )
        if not known & self.accepts:
            raise RefusedPeerError(
                Refusal.WRONG_ROLE,
                f"the key {pin} is the {' and '.join(sorted(known))}'s, not the {wanted}'s",
                hint="check the address in session.connect, and the roles in [[peers]]",
            )
        if fault := out_of_date(certificate, self.clock()):
            raise RefusedPeerError(
                Refusal.OUT_OF_DATE,
                f"the {wanted}: its certificate {fault}",
                hint="set the clocks, or have it renewed: `veiltune keygen --renew`",
            )
        return known & self.accepts, pin

    # --- TLS ----------------------------------------------------------------------------------------------------------

    def _encrypt(self, sock: socket.socket, der: bytes, deadline: float) -> SecureSocket:
        """TLS over the connection, with exactly that certificate at the other end."""
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        tls = self._context(der).wrap_socket(
            sock, server_side=self.listening, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        with closing_on_failure(tls):
            tls.do_handshake()
            return _require_certificate(tls, der)

    def _context(self, der: bytes) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if self.listening else ssl.PROTOCOL_TLS_CLIENT)
        context.sslsocket_class = SecureSocket
        context.check_hostname = False  # the certificate itself is pinned, not a name in it
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        if self.listening:
            context.num_tickets = 0
        context.load_verify_locations(cadata=der)
        self.identity.key.load_into(context, self.identity.certificate)
        return context

    # --- within TLS: what each end agreed to --------------------------------------------------------------------------

    def _greet(self, tls: ssl.SSLSocket, roles: frozenset[str], deadline: float) -> str:
        (wanted,) = self.accepts
        tls.sendall(self._hello(wanted))
        answer = read_exactly(tls, _HELLO.size + 1, deadline)
        if answer[-1] != Refusal.OTHER_CONFIG:  # of that, this end can say more itself
            self._heed(answer[-1])
        try:
            role = self._judge_hello(answer[:-1], roles)
        except RefusedPeerError as error:
            tls.sendall(bytes([error.refusal]))
            raise
        self._heed(answer[-1])
        tls.sendall(bytes([Refusal.NONE]))
        return role

    def _answer(self, tls: ssl.SSLSocket, roles: frozenset[str], deadline: float) -> str:
        hello = read_exactly(tls, _HELLO.size, deadline)
        try:
            role = self._judge_hello(hello, roles)
        except RefusedPeerError as error:
            tls.sendall(self._hello(min(roles)) + bytes([error.refusal]))
            raise
        tls.sendall(self._hello(role) + bytes([Refusal.NONE]))
        self._heed(read_exactly(tls, 1, deadline)[0])
        return role

    def _hello(self, peer: str) -> bytes:
        return _HELLO.pack(_GREETS, bytes.fromhex(self.fingerprint), self.identity.role.encode(), peer.encode())

    def _judge_hello(self, hello: bytes, roles: frozenset[str]) -> str:
        """The role that the peer's key may act in and that it claims."""
        magic, fingerprint, *names = _HELLO.unpack(hello)
        claimed, wanted = (name.rstrip(b"\0").decode("ascii", "replace") for name in names)
        if magic != _GREETS or not re.fullmatch(ROLE_PATTERN, claimed):
            raise RefusedPeerError(Refusal.MALFORMED, "the peer's greeting is malformed", hint=SAME_VERSION)
        if claimed not in roles:
            raise RefusedPeerError(
                Refusal.WRONG_ROLE,
                f"the peer acts as {claimed}, and its key is the {' and '.join(sorted(roles))}'s",
                hint="check the roles in [[peers]], and which identity.key it runs with",
            )
        if wanted != self.identity.role:
            raise RefusedPeerError(
                Refusal.OTHER_PARTY,
                f"the {claimed} looks for another party than this {self.identity.role}",
                hint="check the address in its session.connect",
            )
        if fingerprint.hex() != self.fingerprint.lower():
            raise RefusedPeerError(
                Refusal.OTHER_CONFIG,
                f"the {claimed} has another configuration, {fingerprint.hex()[:16]}…; this {wanted}'s is "
                f"{self.fingerprint[:16]}…",
                hint=SAME_CONFIG,
            )
        return claimed

    def _heed(self, refusal: int) -> None:
        require_none(refusal, self.identity.role, self.identity.pin)


def _require_certificate(tls: ssl.SSLSocket, der: bytes) -> SecureSocket:
    proven = tls.getpeercert(binary_form=True)
    if not isinstance(tls, SecureSocket) or tls.version() != "TLSv1.3" or proven != der or tls.session_reused:
        raise ProtocolError("TLS ended with another certificate than the announced one", hint=IN_THE_MIDDLE)
    return tls


@contextmanager
def closing_on_failure(tls: ssl.SSLSocket) -> Generator[None]:
    """Whatever fails in TLS closes the connection. A certificate is also judged after the other end could speak."""
    try:
        yield
    except BaseException as error:
        tls.close()
        if isinstance(error, ssl.SSLError):
            raise tls_failure(error) from error
        raise
