"""Mutual TLS between parties: who is let in, what everybody else is told, and that the channel is as good as a plain one."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test_channel import KINDS, Box, Bye, assert_same, box, echo, tcp_sockets
from veiltune.config import Config
from veiltune.errors import ConfigError, FrameError, PeerLostError, ProtocolError
from veiltune.peers import IdentityConfig, PeerConfig
from veiltune.session.service import dial, party_handshake
from veiltune.transport.channel import ChannelOptions
from veiltune.transport.identity import Identity, load_identity, make_identity, new_identity, private_file
from veiltune.transport.one_machine import open_channel
from veiltune.transport.refusals import RefusedPeerError
from veiltune.transport.secure import SecureHandshake, SecureSocket
from veiltune.transport.secure_channel import RECORD_BYTES, SecureChannel
from veiltune.transport.stream import (
    Handshake,
    accept,
    connect,
    listen_loopback,
    read_exactly,
    shake_hands,
    token_handshake,
)

OWNER, PROVIDER, STRANGER = new_identity("owner"), new_identity("provider"), new_identity("owner")
HOST = new_identity("host")
PEERS = tuple(PeerConfig(role=each.role, key=each.pin) for each in (OWNER, PROVIDER, HOST))
FINGERPRINT = 32 * "5a"
OPTIONS: ChannelOptions = {"registry": KINDS, "stall_seconds": 5.0}
TEXT = "the patient was given forty milligrams"


def handshake(identity: Identity, *accepts: str, listening: bool, **changes: Any) -> SecureHandshake:
    given_: dict[str, Any] = {
        "identity": identity,
        "peers": PEERS,
        "accepts": frozenset(accepts),
        "fingerprint": FINGERPRINT,
    }
    given_ |= {"listening": listening, **changes}
    return SecureHandshake(**given_)


def listening(identity: Identity = PROVIDER, **changes: Any) -> SecureHandshake:
    return handshake(identity, "owner", listening=True, **changes)


def connecting(identity: Identity = OWNER, **changes: Any) -> SecureHandshake:
    return handshake(identity, "provider", listening=False, **changes)


def attempt(sock: socket.socket, shake: Handshake, seconds: float) -> socket.socket | ProtocolError:
    try:
        return shake_hands(sock, shake, seconds)
    except ProtocolError as error:
        assert sock.fileno() == -1, "the connection of a failed handshake is closed"
        return error


Ends = tuple[Any, Any]


def meet(
    listener: Handshake, connector: Handshake, seconds: float = 5.0, wire: Callable[[], Ends] = tcp_sockets
) -> Ends:
    """Both handshakes against one another; what came of the connector's and of the listener's."""
    near, far = wire()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(attempt(far, listener, seconds)))
    thread.start()
    mine = attempt(near, connector, seconds)
    thread.join(seconds + 5)
    assert not thread.is_alive(), "the listener hangs"
    return mine, found[0]


def merged(changes: ChannelOptions | None) -> ChannelOptions:
    options: ChannelOptions = {**OPTIONS, **(changes or {})}
    return options


@contextmanager
def linked(
    a: ChannelOptions | None = None, b: ChannelOptions | None = None, **given_: Any
) -> Generator[tuple[SecureChannel, SecureChannel]]:
    near, far = meet(listening(), connecting(), **given_)
    assert isinstance(near, SecureSocket), near
    with SecureChannel(near, "owner", "provider", **merged(a)) as one:
        assert isinstance(far, SecureSocket), far
        with SecureChannel(far, "provider", "owner", **merged(b)) as other:
            yield one, other


# --- who is let in ----------------------------------------------------------------------------------------------------


def test_parties_that_know_one_another_meet_over_tls_1_3() -> None:
    near, far = meet(listening(), connecting())
    with near, far:
        assert near.peer == ("provider", PROVIDER.pin)
        assert far.peer == ("owner", OWNER.pin)
        for end in (near, far):
            assert end.version() == "TLSv1.3"
            assert end.session_reused is False
            assert end.context.num_tickets == 0 or end is near
            assert end.context.minimum_version == end.context.maximum_version == ssl.TLSVersion.TLSv1_3


def test_a_listener_may_take_several_roles_and_knows_which_came() -> None:
    for identity in (OWNER, HOST):
        near, far = meet(
            listening(accepts=frozenset({"owner", "host"})), handshake(identity, "provider", listening=False)
        )
        with near, far:
            assert far.peer == (identity.role, identity.pin)


def test_a_key_with_two_roles_acts_in_the_one_it_claims() -> None:
    peers = (*PEERS, PeerConfig(role="host", key=OWNER.pin))
    as_host = Identity("host", OWNER.key, OWNER.certificate)
    near, far = meet(
        listening(peers=peers, accepts=frozenset({"owner", "host"})),
        handshake(as_host, "provider", listening=False, peers=peers),
    )
    with near, far:
        assert far.peer.role == "host"


class Case(NamedTuple):
    """Who differs, and what each end says of it."""

    listener: dict[str, Any]
    connector: dict[str, Any]
    at_listener: str
    at_connector: str


def at(moment: datetime) -> Callable[[], datetime]:
    return lambda: moment


LATE, EARLY = at(datetime.now(UTC) + timedelta(days=800)), at(datetime.now(UTC) - timedelta(days=3))
EXPIRED = new_identity("owner", days=1, now=datetime.now(UTC) - timedelta(days=9))
TO_COME = new_identity("owner", now=datetime.now(UTC) + timedelta(days=9))
WITH_EXPIRED = (*PEERS, PeerConfig(role="owner", key=EXPIRED.pin), PeerConfig(role="owner", key=TO_COME.pin))
LONG_AGO = at(datetime.now(UTC) - timedelta(days=9))
LATER = at(datetime.now(UTC) + timedelta(days=9))
ONE_OFF = FINGERPRINT[:-1] + "b"
AS_OWNER = Identity("owner", HOST.key, HOST.certificate)

CASES = {
    "a stranger comes": Case(
        {},
        {"identity": STRANGER},
        f"the peer's key {STRANGER.pin} is not known here",
        f"does not know .* {STRANGER.pin}",
    ),
    "a stranger listens": Case(
        {"identity": new_identity("provider")}, {}, "does not know the key of this provider", "is not known here"
    ),
    "another party's key": Case(
        {}, {"identity": HOST}, "is the host's, not the owner's", "does not let the key .* act as host"
    ),
    "another party's key that claims the role": Case(
        {"accepts": frozenset({"owner", "host"})},
        {"identity": AS_OWNER},
        "the peer acts as owner, and its key is the host's",
        "does not let the key .* act as owner",
    ),
    "another party listens": Case(
        {"identity": HOST}, {}, "does not let the key .* act as host", "is the host's, not the provider's"
    ),
    "another party listens with a key of two roles": Case(
        {"identity": Identity("host", PROVIDER.key, PROVIDER.certificate)},
        {"peers": (*PEERS, PeerConfig(role="host", key=PROVIDER.pin))},
        "the owner looks for another party than this host",
        "the peer is not the party that this owner looks for",
    ),
    "a configuration that differs by a bit": Case(
        {"fingerprint": ONE_OFF},
        {},
        "the owner has another configuration, 5a5a5a5a5a5a5a5a…; this provider's is",
        "the provider has another configuration, 5a5a5a5a5a5a5a5a…; this owner's is",
    ),
    "an expired certificate": Case(
        {"peers": WITH_EXPIRED},
        {"identity": EXPIRED, "clock": LONG_AGO},
        "the owner: its certificate expired on",
        "finds the dates of this owner's certificate wrong",
    ),
    "a certificate of the future": Case(
        {"peers": WITH_EXPIRED},
        {"identity": TO_COME, "clock": LATER},
        "the owner: its certificate is not valid before",
        "finds the dates of this owner's certificate wrong",
    ),
    "this end's clock is late": Case(
        {}, {"clock": LATE}, "closed the connection", "this owner's own certificate expired on"
    ),
    "this end's clock is early": Case(
        {}, {"clock": EARLY}, "closed the connection", "this owner's own certificate is not valid before"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_everybody_else_is_refused_and_each_end_says_why(name: str) -> None:
    case = CASES[name]
    start = time.monotonic()
    near, far = meet(listening(**case.listener), connecting(**case.connector))
    assert time.monotonic() - start < 4, "it was refused, and did not merely run out of time"
    for found, words in ((near, case.at_connector), (far, case.at_listener)):
        assert isinstance(found, ProtocolError), f"let in: {found}"
        with pytest.raises(ProtocolError, match=words):
            raise found
        assert found.hint or "closed the connection" in found.message
        assert "PRIVATE" not in found.message


def test_a_fingerprint_has_its_length_and_a_connector_looks_for_one_party() -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits, not 62"):
        connecting(fingerprint=FINGERPRINT[2:])
    with pytest.raises(ValueError, match="looks for one role"):
        connecting(accepts=frozenset({"owner", "host"}))
    assert "redacted" in repr(connecting())


def test_a_channel_is_opened_to_the_party_that_proved_to_be_there_alone() -> None:
    near, far = meet(listening(), connecting())
    with (
        near,
        far,
        pytest.raises(ProtocolError, match="the provider is at the other end of a link that was to be the host's"),
    ):
        open_channel(near, "owner", "host")


# --- those who do not follow the protocol -----------------------------------------------------------------------------


def announce(sock: socket.socket, identity: Identity = OWNER) -> None:
    """All that is public: anybody can send it."""
    sock.sendall(handshake(identity, "provider", listening=False)._announcement())
    head = read_exactly(sock, 7, time.monotonic() + 5)
    read_exactly(sock, int.from_bytes(head[5:], "big"), time.monotonic() + 5)
    sock.sendall(b"\0")


def tls_client(identity: Identity | None, highest: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version, context.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, highest
    if identity is not None:
        identity.key.load_into(context, identity.certificate)
    return context


def finish_tls(sock: socket.socket, context: ssl.SSLContext) -> None:
    with suppress(OSError), context.wrap_socket(sock) as tls:
        tls.sendall(bytes(68))
        tls.recv(100)


def old_tls(sock: socket.socket) -> None:
    announce(sock)
    finish_tls(sock, tls_client(OWNER, ssl.TLSVersion.TLSv1_2))


def no_certificate(sock: socket.socket) -> None:
    announce(sock)
    finish_tls(sock, tls_client(None, ssl.TLSVersion.TLSv1_3))


def another_key(sock: socket.socket) -> None:
    announce(sock)
    finish_tls(sock, tls_client(STRANGER, ssl.TLSVersion.TLSv1_3))


def right_key_wrong_greeting(sock: socket.socket) -> None:
    announce(sock)
    finish_tls(sock, tls_client(OWNER, ssl.TLSVersion.TLSv1_3))


def plain_words(sock: socket.socket) -> None:
    sock.sendall(b"GET / HTTP/1.1\r\n\r\n")


def plain_after_announcing(sock: socket.socket) -> None:
    announce(sock)
    sock.sendall(b"VTN1" + bytes(400))


def tls_at_once(sock: socket.socket) -> None:
    finish_tls(sock, tls_client(OWNER, ssl.TLSVersion.TLSv1_3))


def session_token(sock: socket.socket) -> None:
    with suppress(ProtocolError, OSError):
        token_handshake(bytes(32), listening=False)(sock)


def nothing(sock: socket.socket) -> None:
    sock.recv(1)


def half_an_announcement(sock: socket.socket) -> None:
    sock.sendall(connecting()._announcement()[:100])
    sock.recv(1)


def a_byte_now_and_then(sock: socket.socket) -> None:
    with suppress(OSError):
        for byte in connecting()._announcement():
            sock.sendall(bytes([byte]))
            time.sleep(0.05)


def stops_after_announcing(sock: socket.socket) -> None:
    announce(sock)
    sock.recv(1)


def no_certificate_at_all(sock: socket.socket) -> None:
    sock.sendall(b"VTS1\0\0\0")


def unknown_refusal(sock: socket.socket) -> None:
    sock.sendall(b"VTS1\xee\0\0")


STRANGE: dict[Callable[[socket.socket], None], str] = {
    old_tls: "TLS with the peer failed: UNSUPPORTED_PROTOCOL",
    no_certificate: "TLS with the peer failed: PEER_DID_NOT_RETURN_A_CERTIFICATE",
    another_key: "announced one certificate and used another",
    right_key_wrong_greeting: "greeting is malformed",
    plain_words: "it begins with b'GET '",
    plain_after_announcing: "TLS with the peer failed: WRONG_VERSION_NUMBER",
    tls_at_once: r"it begins with b'\\x16\\x03\\x01",
    session_token: "what came is no secure channel",
    nothing: "it took longer than 0.6 s",
    half_an_announcement: "it took longer than 0.6 s",
    a_byte_now_and_then: "it took longer than 0.6 s",
    stops_after_announcing: "it took longer than 0.6 s",
    no_certificate_at_all: "a certificate of 0 bytes",
    unknown_refusal: "for the unknown reason 238",
}


@pytest.mark.parametrize("script", STRANGE, ids=lambda script: script.__name__)
def test_whoever_does_not_follow_the_protocol_is_turned_away_in_time(script: Callable[[socket.socket], None]) -> None:
    near, far = tcp_sockets()
    seconds = 0.6 if "longer" in STRANGE[script] else 5.0
    with near:
        near.settimeout(6)
        thread = threading.Thread(target=script, args=(near,))
        thread.start()
        start = time.monotonic()
        with pytest.raises(ProtocolError, match=STRANGE[script]):
            shake_hands(far, listening(), seconds)
        assert time.monotonic() - start < 4
        assert far.fileno() == -1
        thread.join(10)
        assert not thread.is_alive()


def test_a_silent_stranger_does_not_keep_others_out() -> None:
    """The listener's wait goes on, and says of the others why they were turned away."""
    with listen_loopback() as listener:
        found: list[Any] = []

        def come() -> None:
            host, port = listener.getsockname()
            for script in (plain_words, no_certificate_at_all):
                with socket.create_connection((host, port)) as sock:
                    script(sock)
            found.append(connect(host, port, connecting(), 10))

        thread = threading.Thread(target=come)
        thread.start()
        with accept(listener, listening(), 20) as accepted:
            thread.join()
            assert isinstance(accepted, SecureSocket)
            with found[0]:
                assert accepted.peer.role == "owner"
    with listen_loopback() as listener:
        guest = socket.create_connection(listener.getsockname())
        plain_words(guest)
        with pytest.raises(PeerLostError, match=r"\(1 turned away, the last because what came is no secure channel"):
            accept(listener, listening(), 0.5)
        guest.close()


def test_a_dialler_learns_what_the_listener_has_against_it() -> None:
    with listen_loopback() as listener:
        thread = threading.Thread(target=lambda: attempt(listener.accept()[0], listening(fingerprint=ONE_OFF), 5))
        thread.start()
        with pytest.raises(ProtocolError, match=r"did not prove that it belongs.*has another configuration") as caught:
            connect("127.0.0.1", listener.getsockname()[1], connecting(), 5)
        assert "session" in str(caught.value.hint)
        thread.join()


# --- somebody in the middle -------------------------------------------------------------------------------------------


class Relay:
    """Two connections and threads that carry bytes from one to the other, as ``edit(direction, offset, data)`` leaves them.

    An edit that returns None holds everything back from then on.
    """

    def __init__(self, edit: Callable[[int, int, bytes], bytes | None] | None = None) -> None:
        self.edit = edit or (lambda _direction, _offset, data: data)
        self.crossed = [b"", b""]
        self.near, one = tcp_sockets()
        other, self.far = tcp_sockets()
        self.inner = (one, other)
        self.threads = [
            threading.Thread(target=self._carry, args=(direction, source, sink), daemon=True)
            for direction, source, sink in ((0, one, other), (1, other, one))
        ]
        for thread in self.threads:
            thread.start()

    def _carry(self, direction: int, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                edited = self.edit(direction, len(self.crossed[direction]), data)
                self.crossed[direction] += data
                if edited is None:
                    while source.recv(1 << 16):
                        pass
                    break
                sink.sendall(edited)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def ends(self) -> Ends:
        return self.near, self.far

    def close(self) -> None:
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        for sock in self.inner:
            sock.close()


@pytest.mark.parametrize("side", ["listener", "connector"])
def test_a_man_in_the_middle_who_relays_what_is_public_gets_no_further(side: str) -> None:
    """It can repeat both announcements, and cannot prove either key."""
    near, far = tcp_sockets()

    def attack() -> None:
        if side == "listener":
            announce(near)
            finish_tls(near, tls_client(STRANGER, ssl.TLSVersion.TLSv1_3))
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        STRANGER.key.load_into(context, STRANGER.certificate)
        head = read_exactly(near, 7, time.monotonic() + 5)
        read_exactly(near, int.from_bytes(head[5:], "big"), time.monotonic() + 5)
        near.sendall(listening()._announcement())
        assert read_exactly(near, 1, time.monotonic() + 5) == b"\0"
        with suppress(OSError), context.wrap_socket(near, server_side=True) as tls:
            assert tls.recv(1000) == b"", "not a word of the greeting"

    with near:
        thread = threading.Thread(target=attack)
        thread.start()
        with pytest.raises(ProtocolError, match="announced one certificate and used another") as caught:
            shake_hands(far, listening() if side == "listener" else connecting(), 5)
        assert "somebody may stand between" in str(caught.value.hint)
        thread.join(10)
        assert not thread.is_alive()


def test_a_man_in_the_middle_with_a_key_of_his_own_is_a_stranger() -> None:
    found = meet(listening(), connecting(peers=(PeerConfig(role="provider", key=STRANGER.pin),)))[0]
    assert isinstance(found, RefusedPeerError)
    assert "compare the keys" in str(found.hint)


def test_nothing_that_was_said_is_seen_on_the_wire() -> None:
    """And without TLS it is: the relay sees the same text there."""
    seen: dict[str, bytes] = {}
    numbers = box(7, 2000)
    payload = bytes(numbers.tensors[0].numpy().tobytes())
    for kind, hands in (
        ("secure", (listening(), connecting())),
        ("token", (token_handshake(bytes(32), listening=True), token_handshake(bytes(32), listening=False))),
    ):
        relay = Relay()
        near, far = meet(*hands, wire=relay.ends)
        with ExitStack() as stack:
            one = stack.enter_context(open_channel(near, "owner", "provider", **OPTIONS))
            other = stack.enter_context(open_channel(far, "provider", "owner", **OPTIONS))
            one.send(numbers)
            assert_same(other.recv(5), numbers)
            other.send(Bye())
            assert one.recv(5) == Bye()
        relay.close()
        seen[kind] = b"".join(relay.crossed)
    for known in (payload, payload[4000:4032], b"VTN1", b'"kind"', b"Bye", bytes.fromhex(FINGERPRINT)):
        assert known not in seen["secure"]
    assert all(known in seen["token"] for known in (payload, b"VTN1", b"Bye"))


@pytest.mark.parametrize("direction", [0, 1])
def test_a_bit_that_flips_on_the_way_is_noticed_before_it_is_used(direction: int) -> None:
    armed = threading.Event()

    def flip(which: int, offset: int, data: bytes) -> bytes:
        if which != direction or not armed.is_set():
            return data
        armed.clear()
        return data[:-1] + bytes([data[-1] ^ 1])

    relay = Relay(flip)
    with linked(wire=relay.ends) as ends:
        sender, receiver = ends[direction], ends[1 - direction]
        sender.send(box(1, 10))
        assert_same(receiver.recv(5), box(1, 10))
        armed.set()
        sender.send(box(2, 10))
        with pytest.raises(ProtocolError, match="was disturbed: DECRYPTION_FAILED_OR_BAD_RECORD_MAC"):
            receiver.recv(5)
        for use in (lambda: receiver.send(Bye()), lambda: receiver.recv(1)):
            with pytest.raises(ProtocolError, match="out of step"):
                use()
    relay.close()
    with linked() as (one, other):  # and this thread's next connection is none the worse for it
        one.send(Bye())
        assert other.recv(5) == Bye()


MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.one_of(st.integers(0, 30), st.integers(0, 2500)),
        st.sampled_from(["flip", "flip", "drop", "insert", "repeat", "end", "hold"]),
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=3,
)


def mutated(mutations: list[tuple[int, int, str, int]]) -> Callable[[int, int, bytes], bytes | None]:
    def edit(direction: int, offset: int, data: bytes) -> bytes | None:
        for which, position, how, value in mutations:
            place = position - offset
            if which != direction or not 0 <= place < len(data):
                continue
            before, byte, after = data[:place], data[place : place + 1], data[place + 1 :]
            if how in {"end", "hold"}:
                return None
            middle = {
                "flip": bytes([byte[0] ^ value]),
                "drop": b"",
                "insert": byte + bytes([value]),
                "repeat": byte * 2,
            }
            data = before + middle[how] + after
        return data

    return edit


@pytest.mark.slow
@pytest.mark.ci
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(MUTATIONS)
def test_whatever_happens_to_the_bytes_both_ends_end_well_and_in_time(
    mutations: list[tuple[int, int, str, int]],
) -> None:
    """Each end is let in or says why not, within its time; what is let in hears what was said, or an error of ours.

    A byte that is dropped or held back leaves both ends waiting, so the time is short.
    """
    relay = Relay(mutated(mutations))
    start = time.monotonic()
    near, far = meet(listening(), connecting(), seconds=0.4, wire=relay.ends)
    assert time.monotonic() - start < 5
    with ExitStack() as stack:
        open_ends = [end for end in (near, far) if isinstance(end, SecureSocket)]
        assert all(isinstance(end, (SecureSocket, ProtocolError)) for end in (near, far))
        channels = [
            stack.enter_context(open_channel(end, end_role, end.peer.role, registry=KINDS, stall_seconds=0.3))
            for end in open_ends
            for end_role in ({"owner", "provider"} - {end.peer.role})
        ]
        for channel in channels:
            with suppress(ProtocolError, PeerLostError):
                channel.send(box(3, 40))
        for channel in channels:
            with suppress(ProtocolError, PeerLostError):
                assert_same(channel.recv(0.3), box(3, 40))
    relay.close()


# --- a channel like the others ----------------------------------------------------------------------------------------


def test_messages_of_every_size_cross_both_ways_in_order() -> None:
    sizes = [(), (3,), (1, 2, 3), (RECORD_BYTES // 4 - 40,), (RECORD_BYTES,), (5, RECORD_BYTES, 7, 300_000), (0,)]
    with linked() as (one, other):
        thread = threading.Thread(target=echo, args=(other,))
        thread.start()

        def send_all() -> None:
            for number, each in enumerate(sizes):
                one.send(box(number, *each))
            one.send(Bye())

        sender = threading.Thread(target=send_all)
        sender.start()  # one thread sends while another receives, through one TLS connection
        for number, each in enumerate(sizes):
            assert_same(one.recv(20), box(number, *each))
        sender.join()
        thread.join()
        assert one.peer_pin == PROVIDER.pin


def test_poll_tells_whether_a_message_waits_and_waiting_is_passive() -> None:
    with linked() as (one, other):
        assert not other.poll()
        one.send(Bye())
        one.send(box(1, 3))
        assert other.poll(5)
        assert other.poll()
        assert other.recv() == Bye()
        assert other.poll(5), "the second may have come in one read with the first"
        assert_same(other.recv_as(Box, 5), box(1, 3))
        cpu, wall = time.thread_time(), time.monotonic()
        assert not other.poll(0.3)
        assert time.thread_time() - cpu < 0.05
        assert time.monotonic() - wall >= 0.29
        with pytest.raises(PeerLostError, match=r"sent nothing within 0\.02 s"):
            other.recv(0.02)


def test_bytes_that_make_no_record_yet_are_no_message() -> None:
    """A plain channel would wait for the rest of the frame, beyond the time it was given."""

    def trickle(direction: int, offset: int, data: bytes) -> bytes | None:
        return data[:3] if armed.is_set() else data

    armed = threading.Event()
    relay = Relay(trickle)
    with linked(wire=relay.ends) as (one, other):
        armed.set()
        one.send(box(1, 100))
        start = time.monotonic()
        assert not other.poll(0.2)
        assert time.monotonic() - start < 2
    relay.close()


def test_what_was_sent_before_the_end_can_still_be_received() -> None:
    with linked() as (one, other):
        one.send(box(1, 40))
        one.close()
        one.close()
        assert_same(other.recv(5), box(1, 40))
        assert other.poll(5)
        with pytest.raises(PeerLostError, match="the owner closed its link"):
            other.recv(5)
        for use in (one.recv, lambda: one.send(Bye()), one.poll):
            with pytest.raises(PeerLostError, match="closed at this end"):
                use()


def test_nothing_is_sent_in_the_clear_at_the_end() -> None:
    """Python's TLS sockets turn into plain ones after their last word; the channel does not."""
    relay = Relay()
    with linked(wire=relay.ends) as (one, other):
        other.close()
        assert one.poll(5)
        one.close()
        with pytest.raises(PeerLostError):
            one._send_pieces([memoryview(TEXT.encode())])
    relay.close()
    assert TEXT.encode() not in b"".join(relay.crossed)


def test_a_peer_that_dies_in_the_middle_of_a_frame_is_lost() -> None:
    with linked() as (one, other):
        one._send_pieces([memoryview(b"VTN1" + bytes(4))])
        socket.socket.close(one._tls)  # as a kill does: without TLS's farewell
        with pytest.raises(PeerLostError, match="the owner closed its link"):
            other.recv(5)


def test_a_peer_that_stalls_is_lost_and_the_limits_hold() -> None:
    with linked({"stall_seconds": 0.2}, {"stall_seconds": 0.2, "max_payload_bytes": 100}) as (one, other):
        one.send(box(1, 25))
        assert_same(other.recv(5), box(1, 25))
        with pytest.raises(PeerLostError, match=r"the provider made no progress for 0\.2 s"):
            one.send(box(2, 10_000_000))  # nobody reads
        with pytest.raises(FrameError, match="a payload of 40000000 bytes exceeds the limit of 100"):
            other.recv(5)


def test_a_kind_that_may_not_come_is_refused() -> None:
    with linked(None, {"may_receive": frozenset({"Bye"})}) as (one, other):
        one.send(box(1, 3))
        with pytest.raises(ProtocolError, match="from the owner: the provider may not receive Box"):
            other.recv(5)


def test_connections_leave_no_descriptor_open() -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with linked():
        pass
    before = descriptors()
    with linked() as (one, other):
        one.send(Bye())
        other.recv(5)
    meet(listening(), connecting(identity=STRANGER))
    meet(listening(fingerprint=ONE_OFF), connecting())
    assert descriptors() == before


# --- as sessions use it -----------------------------------------------------------------------------------------------


def config_of(directory: Path, role: str, **changes: Any) -> Config:
    """A party's own configuration, with what `keygen` made for all of them in one directory."""
    pins = {each: load_identity(private_file(directory, each)).pin for each in ("owner", "provider")}
    values: dict[str, Any] = {"design": "split", "model": "random:llama", "output": directory / role}
    values["peers"] = tuple(PeerConfig(role=each, key=pin) for each, pin in pins.items())
    values["identity"] = IdentityConfig(key=private_file(directory, role))
    return Config.model_validate({**values, **changes})


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    for role in ("owner", "provider"):
        make_identity(tmp_path, role)
    return tmp_path


@pytest.mark.parametrize(("seed", "dtype"), [(0, "float32"), (1, "float32"), (0, "float64")])
def test_a_party_dials_a_service_by_its_key_if_both_agree(keys: Path, seed: int, dtype: str) -> None:
    shake = party_handshake(config_of(keys, "provider"), "provider", "owner", listening=True)
    with listen_loopback() as listener:
        host, port = listener.getsockname()
        session = {"connect": {"provider": f"{host}:{port}"}, "retry_seconds": 5.0}
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(attempt(listener.accept()[0], shake, 5)))
        thread.start()
        config = config_of(keys, "owner", session=session, seed=seed, dtype=dtype)
        differs = dtype != "float32"  # the seed is the owner's own business
        if differs:
            with pytest.raises(ProtocolError, match="the provider has another configuration"):
                dial(config, "provider", OPTIONS, me="owner")
        else:
            with dial(config, "provider", OPTIONS, me="owner") as link:
                thread.join(5)
                with open_channel(found[0], "provider", "owner", **OPTIONS) as other:
                    link.send(Bye())
                    assert other.recv(5) == Bye()
        thread.join(5)
        assert isinstance(found[0], ProtocolError if differs else SecureSocket)


@pytest.mark.parametrize(
    ("me", "peer", "changes", "message"),
    [
        ("provider", "owner", {"identity": IdentityConfig(key=Path("nowhere.key"))}, "no key file 'nowhere.key'"),
        ("owner", "provider", {}, "is the provider's, and this is the owner"),
        ("provider", "host", {}, r"no key for the host"),
        ("provider", "owner", {"peers": PEERS}, r"\[\[peers\]\] lists another for it"),
        ("provider", "owner", {"identity": IdentityConfig()}, "session.token_file is not set"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_before_anything_is_dialled(
    keys: Path, me: str, peer: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        party_handshake(config_of(keys, "provider", **changes), me, peer, listening=False)
    assert caught.value.hint


def listen_in_a_process() -> None:
    """What the child runs: ``DIRECTORY``. It says where it listens, serves one peer, and waits to be killed."""
    shake = party_handshake(config_of(Path(sys.argv[1]), "provider"), "provider", "owner", listening=True)
    with listen_loopback() as listener:
        print(listener.getsockname()[1], flush=True)
        sock = accept(listener, shake, 60)
    echo(open_channel(sock, "provider", "owner", registry=KINDS))
    time.sleep(60)


def test_two_processes_meet_by_their_keys_and_a_death_is_noticed(keys: Path) -> None:
    search = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    command = [sys.executable, "-c", "import test_secure_channel as t; t.listen_in_a_process()", str(keys)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": search}, text=True) as child:
        try:
            assert child.stdout is not None
            address = ("127.0.0.1", int(child.stdout.readline()))
            with pytest.raises(ProtocolError, match="does not know the key of this owner"):
                connect(*address, connecting(identity=STRANGER, peers=config_of(keys, "owner").peers), 5)
            shake = party_handshake(config_of(keys, "owner"), "owner", "provider", listening=False)
            with open_channel(connect(*address, shake, 5), "owner", "provider", **OPTIONS) as link:
                for number, size in enumerate((0, 3, 50_000)):
                    link.send(box(number, size, 1))
                    assert_same(link.recv(30), box(number, size, 1))
                threading.Timer(0.1, child.kill).start()
                with pytest.raises(PeerLostError, match="the provider closed its link"):
                    link.recv(30)
        finally:
            child.kill()
