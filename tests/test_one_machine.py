"""Shared memory under keys: used where both ends see it and want it, never where they do not, and no worse than TLS."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers import make_config
from test_channel import Bye, assert_same, box, echo
from test_secure_channel import OPTIONS, Relay, connecting, listening, meet
from veiltune.errors import PeerLostError, ProtocolError
from veiltune.session.service import party_handshake
from veiltune.transport import one_machine
from veiltune.transport.identity import make_identity, private_file
from veiltune.transport.one_machine import MemoryHandshake, SecureMemoryChannel, open_channel
from veiltune.transport.secure import SecureHandshake, SecureSocket
from veiltune.transport.secure_channel import SecureChannel
from veiltune.transport.shared_memory import DEFAULT_ARENA_BYTES, SharedArena
from veiltune.transport.stream import TOKEN_BYTES

Pair = tuple[SecureChannel, SecureChannel]


def hands(*, listener: bool = True, connector: bool = True) -> tuple[MemoryHandshake, MemoryHandshake]:
    return (
        MemoryHandshake(secure=listening(), wanted=listener),
        MemoryHandshake(secure=connecting(), wanted=connector),
    )


@contextmanager
def linked(*shakes: Any, **given: Any) -> Generator[Pair]:
    listener, connector = shakes or hands()
    near, far = meet(listener, connector, **given)
    assert isinstance(near, SecureSocket), near
    assert isinstance(far, SecureSocket), far
    one, other = open_channel(near, "owner", "provider", **OPTIONS), open_channel(far, "provider", "owner", **OPTIONS)
    with one, other:
        assert isinstance(one, SecureChannel)
        assert isinstance(other, SecureChannel)
        assert type(one) is type(other), "both use the memory, or neither does"
        yield one, other


def carries_both_ways(pair: Pair, *sizes: int) -> None:
    one, other = pair
    for sender, receiver in (pair, pair[::-1]):
        thread = threading.Thread(target=sender.send, args=(box(3, *sizes),))
        thread.start()
        assert_same(receiver.recv(20), box(3, *sizes))
        thread.join(10)
    one.send(Bye())
    assert other.recv(5) == Bye()


def test_payloads_do_not_cross_the_wire_and_arrive() -> None:
    """And without memory they do cross it, as many bytes as there are."""
    crossed: dict[bool, int] = {}
    for wanted in (True, False):
        relay = Relay()
        with linked(*hands(connector=wanted), wire=relay.ends) as pair:
            assert isinstance(pair[0], SecureMemoryChannel) is wanted
            carries_both_ways(pair, 100_000)
        relay.close()
        crossed[wanted] = len(b"".join(relay.crossed))
    assert crossed[False] > 2 * 400_000 > 20 * crossed[True]


def test_what_does_not_fit_goes_through_tls() -> None:
    with linked() as pair:
        assert isinstance(pair[0], SecureMemoryChannel)
        carries_both_ways(pair, DEFAULT_ARENA_BYTES // 4 + 1)
        carries_both_ways(pair, 10)


def test_a_long_conversation_goes_round_the_ring() -> None:
    with linked() as (one, other):
        thread = threading.Thread(target=echo, args=(other,))
        thread.start()
        for number in range(30):
            one.send(box(number, 300_000, number))
            assert_same(one.recv(10), box(number, 300_000, number))
        one.send(Bye())
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize(("listener", "connector"), [(True, False), (False, True), (False, False)])
def test_both_must_want_it(listener: bool, connector: bool) -> None:
    with linked(*hands(listener=listener, connector=connector)) as pair:
        assert not isinstance(pair[0], SecureMemoryChannel)
        carries_both_ways(pair, 1000)


def test_from_elsewhere_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_machine, "is_loopback", lambda _: False)
    with linked() as pair:
        assert not isinstance(pair[0], SecureMemoryChannel)
        carries_both_ways(pair, 1000)


def test_no_descriptor_stays_open() -> None:
    def open_ones() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with linked() as pair:
        carries_both_ways(pair, 10)  # whatever is opened once, is open now
    before = open_ones()
    for wanted in (True, False):
        with linked(*hands(listener=wanted)):
            assert open_ones() > before
        assert open_ones() == before


# --- offers that are not what they say ----------------------------------------------------------------------------------


def offering(*fields: Any) -> Callable[[socket.socket], SecureSocket]:
    """A connector that offers what it likes."""

    def shake(sock: socket.socket) -> SecureSocket:
        tls = connecting()(sock)
        tls.sendall(struct.pack(f">4sIII{TOKEN_BYTES}s{TOKEN_BYTES}s", b"VTM1", *fields))
        assert tls.recv(1) == b"\0", "declined"
        return tls

    return shake


def unsealed() -> int:
    fd = os.memfd_create("veiltune-arena", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096 + DEFAULT_ARENA_BYTES)
    return fd


def other_file() -> int:
    return os.open("/dev/null", os.O_RDWR)


def too_small() -> int:
    arena = SharedArena.create(100)
    fd = os.dup(arena.fd)
    arena.close()
    return fd


def with_another_token() -> int:
    arena = SharedArena.create()
    arena.set_token(bytes(range(TOKEN_BYTES)))
    fd = os.dup(arena.fd)
    arena.close()
    return fd


@pytest.mark.parametrize("made", [unsealed, other_file, too_small, with_another_token])
def test_an_arena_that_is_none_is_declined_and_tls_goes_on(made: Callable[[], int]) -> None:
    good = SharedArena.create()
    fd = made()
    before = len(list(Path("/proc/self/fd").iterdir()))
    shake = offering(os.getpid(), good.fd, fd, bytes(TOKEN_BYTES), bytes(TOKEN_BYTES))
    with linked(hands()[0], shake) as pair:
        carries_both_ways(pair, 1000)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    os.close(fd)
    good.close()


def test_the_good_twin_of_these_is_taken() -> None:
    """With the right token and seals the same offer is accepted: it is those that decide."""
    arenas = [SharedArena.create(), SharedArena.create()]
    for arena in arenas:
        arena.set_token(bytes(range(TOKEN_BYTES)))
        assert fcntl.fcntl(arena.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        mapped = one_machine._mapped(os.getpid(), arena.fd, bytes(range(TOKEN_BYTES)))
        assert mapped is not None
        mapped.close()
        assert one_machine._mapped(os.getpid(), arena.fd, bytes(TOKEN_BYTES)) is None
        arena.close()


def test_a_process_that_is_gone_is_declined() -> None:
    with linked(hands()[0], offering(2**22 + 1, 5, 6, bytes(TOKEN_BYTES), bytes(TOKEN_BYTES))) as pair:
        carries_both_ways(pair, 1000)


def test_something_else_than_an_offer_is_refused() -> None:
    def shake(sock: socket.socket) -> SecureSocket:
        tls = connecting()(sock)
        tls.sendall(bytes(200))
        return tls

    near, far = meet(hands()[0], shake)
    assert isinstance(far, ProtocolError)
    assert "no offer of shared memory" in str(far)
    near.close()


@pytest.mark.parametrize("side", [0, 1])
def test_an_end_that_says_nothing_is_not_waited_for(side: int) -> None:
    """One of the two does not know of this: the other's handshake ends with its time."""
    plain: list[Any] = [listening(), connecting()]
    mixed = [hands()[side], plain[1 - side]] if side == 0 else [plain[0], hands()[1]]
    begin = time.monotonic()
    found = meet(*mixed, seconds=0.5)
    assert time.monotonic() - begin < 5
    broken, fine = (found[1], found[0]) if side == 0 else (found[0], found[1])
    assert isinstance(broken, ProtocolError), broken
    fine.close()


# --- the end ------------------------------------------------------------------------------------------------------------


def send_much(channel: SecureChannel) -> None:
    """More than there is room for."""
    for number in range(100):
        channel.send(box(number, DEFAULT_ARENA_BYTES // 8))


def test_the_peers_end_is_noticed() -> None:
    with linked() as (one, other):
        one.close()
        with pytest.raises(PeerLostError):
            other.recv(5)
        with pytest.raises(PeerLostError):
            send_much(other)


def test_a_link_that_is_closed_by_another_thread_is_lost_not_broken() -> None:
    with linked() as (one, other), ThreadPoolExecutor() as pool:
        sending = pool.submit(send_much, one)
        other.recv(5)
        time.sleep(0.05)  # it waits for room
        one.close()
        assert isinstance(sending.exception(10), PeerLostError)


# --- who may ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("design", "me", "peer", "shares"),
    [
        ("veil", "enclave", "host", True),
        ("obfuscatune", "enclave", "host", True),
        ("veil", "provider", "enclave", False),
        ("veil", "owner", "enclave", False),
        ("veil", "owner", "provider", False),
        ("split", "owner", "provider", False),
    ],
)
@pytest.mark.parametrize("link", ["shared_memory", "tcp"])
def test_only_an_enclave_and_its_host_share_memory(
    tmp_path: Path, design: str, me: str, peer: str, shares: bool, link: str
) -> None:
    keys = {role: make_identity(tmp_path / role, role) for role in (me, peer)}
    peers = [{"role": role, "key": each.pin} for role, each in keys.items()]
    for role, other, listens in ((me, peer, False), (peer, me, True)):
        config = make_config(
            design,
            "random:llama:2,32,4,259",
            tmp_path,
            session={"link": link},
            identity={"key": str(private_file(tmp_path / role, role))},
            peers=peers,
        )
        shake = party_handshake(config, role, other, listening=listens)
        assert isinstance(shake, MemoryHandshake) is shares
        if isinstance(shake, MemoryHandshake):
            assert shake.wanted is (link == "shared_memory")
        else:
            assert isinstance(shake, SecureHandshake)
