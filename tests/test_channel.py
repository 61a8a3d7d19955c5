"""Links between parties: the same bytes over every wire, guards at both ends, and a peer's end noticed at once."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from veiltune.errors import FrameError, PeerLostError, ProtocolError
from veiltune.transport import stream
from veiltune.transport.channel import Channel, ChannelOptions, memory_pair
from veiltune.transport.codec import encode
from veiltune.transport.frame import Frame
from veiltune.transport.messages import Message
from veiltune.transport.shared_memory import SharedArena, SharedMemoryChannel, open_link
from veiltune.transport.stream import SocketChannel, accept, connect, listen_loopback, token_handshake


@dataclass(frozen=True, slots=True)
class Box(Message):
    number: int
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Bye(Message):
    pass


KINDS: dict[str, type[Message]] = {"Box": Box, "Bye": Bye}
ARENA_BYTES = 5000  # no multiple of anything
TOKEN = bytes(range(32))
Pair = tuple[Channel, Channel]
Link = Callable[..., Pair]


class Seen(NamedTuple):
    direction: str
    peer: str
    kind: str
    data: bytes


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def sent(self, peer: str, kind: str, frame: Frame) -> None:
        self.seen.append(Seen("sent", peer, kind, frame.to_bytes()))

    def received(self, peer: str, kind: str, frame: Frame) -> None:
        self.seen.append(Seen("received", peer, kind, frame.to_bytes()))


def tcp_sockets() -> tuple[socket.socket, socket.socket]:
    with listen_loopback() as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


def make_pair(wire: str, a: ChannelOptions, b: ChannelOptions) -> Pair:
    if wire == "memory":
        return memory_pair("owner", "host", a_options=a, b_options=b)
    if wire == "shared":
        ours, theirs = open_link(ARENA_BYTES)
        return (
            SharedMemoryChannel.from_fds(ours, ARENA_BYTES, "owner", "host", **a),
            SharedMemoryChannel.from_fds(theirs, ARENA_BYTES, "host", "owner", **b),
        )
    first, second = tcp_sockets() if wire == "tcp" else socket.socketpair()
    return SocketChannel(first, "owner", "host", **a), SocketChannel(second, "host", "owner", **b)


@pytest.fixture(params=["memory", "unix", "tcp", "shared"])
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    """Makes linked ends over each wire, and closes them."""
    with ExitStack() as stack:

        def open_pair(a: ChannelOptions | None = None, b: ChannelOptions | None = None) -> Pair:
            base: ChannelOptions = {"registry": KINDS}
            pair = make_pair(request.param, {**base, **(a or {})}, {**base, **(b or {})})
            for channel in pair:
                stack.enter_context(channel)
            return pair

        yield open_pair


def box(number: int, *sizes: int) -> Box:
    generator = torch.Generator().manual_seed(number)
    return Box(number, tuple(torch.randn(size, generator=generator) for size in sizes))


def assert_same(message: Message, expected: Box) -> None:
    assert isinstance(message, Box)
    assert message.number == expected.number
    assert len(message.tensors) == len(expected.tensors)
    assert all(map(torch.equal, message.tensors, expected.tensors))


def echo(channel: Channel) -> None:
    """Send everything back until a Bye or the link's end."""
    while isinstance(message := channel.recv(), Box):
        channel.send(message)


# --- what every wire does ---------------------------------------------------------------------------------------------


def test_every_wire_carries_the_same_bytes() -> None:
    messages = [box(1, 3), box(2), Bye(), box(3, 100, 7, 0, 65), box(4, ARENA_BYTES)]
    expected = [encode(message).to_bytes() for message in messages]
    for wire in ("memory", "unix", "tcp", "shared"):
        ours, theirs = Recorder(), Recorder()
        a, b = make_pair(wire, {"registry": KINDS, "observers": [ours]}, {"registry": KINDS, "observers": [theirs]})
        with a, b:
            for message in messages:
                a.send(message)
                b.recv(timeout=10)
        assert [seen.data for seen in ours.seen] == expected, wire
        assert [seen.data for seen in theirs.seen] == expected, wire
        assert {seen[:2] for seen in ours.seen} == {("sent", "host")}
        assert {seen[:2] for seen in theirs.seen} == {("received", "owner")}
        assert [seen.kind for seen in theirs.seen] == ["Box", "Box", "Bye", "Box", "Box"]


def test_messages_cross_both_ways_in_order(link: Link) -> None:
    a, b = link()
    for number in range(5):
        a.send(box(number, number, 3))
        b.send(box(number + 10, 2))
    for number in range(5):
        assert_same(b.recv(10), box(number, number, 3))
        assert_same(a.recv(10), box(number + 10, 2))
    assert (a.me, a.peer, b.me, b.peer) == ("owner", "host", "host", "owner")


def test_neither_end_can_change_the_others_tensors(link: Link) -> None:
    a, b = link()
    message = box(1, 50)
    a.send(message)
    message.tensors[0].fill_(7)
    received = b.recv_as(Box, 10)
    assert_same(received, box(1, 50))
    received.tensors[0].fill_(9)
    assert message.tensors[0][0] == 7
    a.send(box(2, 50))
    assert received.tensors[0][0] == 9
    b.recv(10)
    assert received.tensors[0][0] == 9


def test_poll_tells_whether_a_message_waits(link: Link) -> None:
    a, b = link()
    assert not b.poll()
    assert not b.poll(0.01)
    a.send(Bye())
    assert b.poll(10)
    assert b.recv() == Bye()
    assert not b.poll()


def test_recv_in_vain_names_the_peer_and_consumes_nothing(link: Link) -> None:
    a, b = link()
    with pytest.raises(PeerLostError, match=r"the owner sent nothing within 0\.02 s"):
        b.recv(0.02)
    a.send(Bye())
    assert b.recv(10) == Bye()


def test_recv_as_names_what_came_instead(link: Link) -> None:
    a, b = link()
    a.send(Bye())
    a.send(Bye())
    with pytest.raises(ProtocolError, match="expected Box from the owner, got Bye"):
        b.recv_as(Box, 10)
    assert b.recv_as(Bye, 10) == Bye()


def test_a_kind_that_may_not_be_sent_never_leaves(link: Link) -> None:
    recorder = Recorder()
    a, b = link({"may_send": frozenset({"Bye"}), "observers": [recorder]})
    with pytest.raises(ProtocolError, match="the owner may not send Box to the host"):
        a.send(box(1, 3))
    assert not b.poll(0.02)
    assert recorder.seen == []
    a.send(Bye())
    assert b.recv(10) == Bye()


def test_a_kind_that_may_not_be_received_is_refused_before_its_payload(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    a, b = link(None, {"may_receive": frozenset({"Bye"}), "observers": [recorder]})
    a.send(Bye())
    assert b.recv(10) == Bye()
    a.send(box(1, 3))

    def no_memory(*_: object, **__: object) -> None:
        pytest.fail("memory was taken for a message that may not be received")

    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(ProtocolError, match="from the owner: the host may not receive Box"):
        b.recv(10)
    assert [seen.kind for seen in recorder.seen] == ["Bye"]
    with pytest.raises(ProtocolError, match="out of step"):
        b.recv(10)
    b.send(Bye())  # the other direction still carries a farewell
    assert a.recv(10) == Bye()


def test_a_message_of_another_protocol_is_not_sent(link: Link) -> None:
    a, _ = link({"registry": {"Bye": Bye}})
    with pytest.raises(ProtocolError, match="Box is not a message of this protocol"):
        a.send(box(1))


def test_the_payload_limit_holds_at_both_ends(link: Link) -> None:
    a, b = link({"max_payload_bytes": 400}, {"max_payload_bytes": 100})
    with pytest.raises(ProtocolError, match="404 payload bytes exceed 400"):
        a.send(box(1, 101))
    a.send(box(1, 25))
    assert_same(b.recv(10), box(1, 25))
    a.send(box(2, 26))
    with pytest.raises(FrameError, match="from the owner: a payload of 104 bytes exceeds the limit of 100"):
        b.recv(10)


def test_what_was_sent_before_the_end_can_still_be_received(link: Link) -> None:
    a, b = link()
    a.send(box(1, 40))
    a.close()
    a.close()
    assert_same(b.recv(10), box(1, 40))
    with pytest.raises(PeerLostError, match="the owner closed its link"):
        b.recv(10)
    with pytest.raises(PeerLostError, match="closed at this end"):
        a.recv()
    with pytest.raises(PeerLostError, match="closed at this end"):
        a.send(Bye())


def test_a_send_to_a_peer_that_has_gone_fails(link: Link) -> None:
    a, b = link()
    b.close()

    def send_thrice() -> None:  # TCP learns of it with the first answer
        for _ in range(3):
            a.send(Bye())
            time.sleep(0.02)

    with pytest.raises(PeerLostError, match="the host closed its link"):
        send_thrice()


def test_a_waiting_recv_notices_the_peers_end_and_waits_passively(link: Link) -> None:
    a, b = link()
    threading.Timer(0.2, a.close).start()
    wall, cpu = time.monotonic(), time.thread_time()
    with pytest.raises(PeerLostError, match="the owner closed its link"):
        b.recv()
    assert 0.1 < time.monotonic() - wall < 5
    assert time.thread_time() - cpu < 0.05


def test_one_thread_may_send_while_another_receives(link: Link) -> None:
    a, b = link()
    thread = threading.Thread(target=echo, args=(b,))
    thread.start()
    draw = random.Random(0)
    sizes = [[draw.randrange(draw.choice([4, 400, 2000])) for _ in range(draw.randrange(4))] for _ in range(150)]

    def send_all() -> None:
        for number, each in enumerate(sizes):
            a.send(box(number, *each))
        a.send(Bye())

    sender = threading.Thread(target=send_all)
    sender.start()
    for number, each in enumerate(sizes):
        assert_same(a.recv(30), box(number, *each))
    sender.join()
    thread.join()


# --- streams ----------------------------------------------------------------------------------------------------------


def raw_end() -> tuple[socket.socket, SocketChannel]:
    raw, sock = socket.socketpair()
    return raw, SocketChannel(sock, "host", "owner", registry=KINDS, stall_seconds=0.2)


def test_bytes_that_are_no_frame_are_named_with_their_sender() -> None:
    raw, channel = raw_end()
    with raw, channel:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(FrameError, match="from the owner: the frame begins with b'GET '"):
            channel.recv(10)


@pytest.mark.parametrize("num_bytes", [1, 15, 16, 17, 100, 200])
def test_a_peer_that_dies_in_the_middle_of_a_frame_is_lost(num_bytes: int) -> None:
    raw, channel = raw_end()
    data = encode(box(1, 30)).to_bytes()
    assert len(data) > num_bytes
    with channel:
        raw.sendall(data[:num_bytes])
        raw.close()
        with pytest.raises(PeerLostError, match="the owner closed its link"):
            channel.recv(10)
        with pytest.raises(ProtocolError, match="out of step"):
            channel.recv(10)


def test_a_frame_that_arrives_byte_by_byte_is_whole() -> None:
    raw, channel = raw_end()
    with raw, channel:

        def trickle() -> None:
            for byte in encode(box(1, 20)).to_bytes():
                raw.send(bytes([byte]))

        thread = threading.Thread(target=trickle)
        thread.start()
        assert_same(channel.recv(10), box(1, 20))
        thread.join()


def test_a_peer_that_stalls_in_the_middle_of_a_frame_is_lost() -> None:
    raw, channel = raw_end()
    with raw, channel:
        raw.sendall(encode(box(1, 30)).to_bytes()[:-1])
        with pytest.raises(PeerLostError, match=r"the owner made no progress for 0\.2 s"):
            channel.recv(10)
        with pytest.raises(PeerLostError, match=r"the owner made no progress"):
            channel.send(box(2, 10_000_000))  # nobody reads, and no buffer holds 40 MB


# --- how two processes meet -------------------------------------------------------------------------------------------


def test_listeners_are_reachable_from_this_machine_only() -> None:
    with listen_loopback() as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def run_stranger(port: int, script: Callable[[socket.socket], None]) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        script(sock)


def reflect(sock: socket.socket) -> None:
    """Without the token: give back whatever the listener says, in the hope that it is its own proof."""
    sock.sendall(stream.read_exactly(sock, 32, time.monotonic() + 5))
    sock.sendall(bytes(32))
    assert sock.recv(32) == b""  # turned away before it proves anything itself


def hang_up(sock: socket.socket) -> None:
    sock.sendall(b"x")


def wrong_token(sock: socket.socket) -> None:
    with pytest.raises(ProtocolError, match="closed the connection during the handshake"):
        token_handshake(bytes(32), listening=False)(sock)


def test_strangers_are_turned_away_and_do_not_end_the_wait() -> None:
    with listen_loopback() as listener:
        port = listener.getsockname()[1]
        results: list[socket.socket] = []

        def come() -> None:
            for script in (reflect, hang_up, wrong_token):
                run_stranger(port, script)
            results.append(connect("127.0.0.1", port, token_handshake(TOKEN, listening=False), timeout=10))

        thread = threading.Thread(target=come)
        thread.start()
        with accept(listener, token_handshake(TOKEN, listening=True), timeout=20) as accepted:
            thread.join()
            with results[0] as connected:
                assert accepted.getpeername() == connected.getsockname()


def test_accept_gives_up_and_says_how_many_it_turned_away() -> None:
    with listen_loopback() as listener:
        thread = threading.Thread(target=run_stranger, args=(listener.getsockname()[1], hang_up))
        thread.start()
        with pytest.raises(PeerLostError, match=r"no peer connected within 0\.5 s \(1 turned away"):
            accept(listener, token_handshake(TOKEN, listening=True), timeout=0.5)
        thread.join()


def test_connect_refuses_a_listener_without_the_token() -> None:
    with listen_loopback() as listener:

        def impostor() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(bytes(32))
                sock.sendall(stream.read_exactly(sock, 64, time.monotonic() + 5)[32:])  # its own proof

        thread = threading.Thread(target=impostor)
        thread.start()
        with pytest.raises(ProtocolError, match="did not prove that it belongs to this session"):
            connect("127.0.0.1", listener.getsockname()[1], token_handshake(TOKEN, listening=False))
        thread.join()


def test_connect_waits_for_the_listener_and_gives_up_in_time() -> None:
    with listen_loopback() as listener:
        port = listener.getsockname()[1]
    with pytest.raises(PeerLostError, match=rf"nothing listens at 127\.0\.0\.1:{port} after 0\.1 s"):
        connect("127.0.0.1", port, token_handshake(TOKEN, listening=False), timeout=0.1)


def test_a_token_has_32_bytes_and_is_never_shown() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 3"):
        token_handshake(b"abc", listening=True)
    assert repr(TOKEN) not in repr(token_handshake(TOKEN, listening=True))


# --- the shared ring --------------------------------------------------------------------------------------------------


def shared_pair(stall_seconds: float = 60.0) -> tuple[SharedMemoryChannel, SharedMemoryChannel]:
    options: ChannelOptions = {"registry": KINDS, "stall_seconds": stall_seconds}
    ours, theirs = make_pair("shared", options, options)
    assert isinstance(ours, SharedMemoryChannel)
    assert isinstance(theirs, SharedMemoryChannel)
    return ours, theirs


def test_payloads_go_through_the_ring_and_larger_ones_through_the_socket() -> None:
    a, b = shared_pair()
    with a, b:
        for size, in_ring in ((ARENA_BYTES // 4, True), (ARENA_BYTES // 4 + 1, False), (3, True)):
            before = a._out._done
            a.send(box(size, size))
            assert a._out._done - before == (4 * size if in_ring else 0)
            assert_same(b.recv(10), box(size, size))
            assert a._out.room == ARENA_BYTES


def test_a_sender_waits_for_room() -> None:
    a, b = shared_pair()
    with a, b:
        a.send(box(1, 700))
        a.send(box(2, 500))
        sent = threading.Event()

        def third() -> None:
            a.send(box(3, 600))
            sent.set()

        thread = threading.Thread(target=third)
        thread.start()
        assert not sent.wait(0.1)
        for number, size in ((1, 700), (2, 500), (3, 600)):
            assert_same(b.recv(10), box(number, size))
        assert sent.wait(10)
        thread.join()


def test_a_sender_that_waits_for_room_notices_the_peers_end() -> None:
    a, b = shared_pair()
    with a, b:
        a.send(box(1, 1000))
        threading.Timer(0.1, b.close).start()
        with pytest.raises(PeerLostError, match="the host closed its link"):
            a.send(box(2, 1000))


def test_a_sender_does_not_wait_for_room_for_ever() -> None:
    a, b = shared_pair(stall_seconds=0.1)
    with a, b:
        a.send(box(1, 1000))
        with pytest.raises(PeerLostError, match=r"the host took nothing out of the shared arena for 0\.1 s"):
            a.send(box(2, 1000))


def test_an_impossible_counter_is_a_protocol_error() -> None:
    for value in (1, 1 << 40):
        a, b = shared_pair()
        with a, b:
            b._in._counters[8] = value
            with pytest.raises(ProtocolError, match="counter says that -"):
                a.send(box(1, 3))


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only a memfd can be sealed")
def test_a_peer_cannot_shrink_the_arena() -> None:
    arena = SharedArena.create(100)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 0)
    arena.close()


def test_an_arena_without_memfd_has_no_name_and_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr("veiltune.transport.shared_memory._MEMORY_DIRECTORY", tmp_path)
    a, b = shared_pair()
    with a, b:
        assert list(tmp_path.iterdir()) == []
        a.send(box(1, 30))
        assert_same(b.recv(10), box(1, 30))


def test_an_arena_of_another_size_is_refused() -> None:
    arena = SharedArena.create(100)
    with pytest.raises(ProtocolError, match="has 4196 bytes, not 4296"):
        SharedArena.attach(arena.fd, 200)
    arena.close()
    with pytest.raises(ValueError, match="at least one byte"):
        SharedArena.create(0)


def test_links_leave_no_descriptor_open() -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    a, b = shared_pair()
    assert descriptors() > before
    a.close()
    b.close()
    assert descriptors() == before


# --- real processes ---------------------------------------------------------------------------------------------------


def echo_process() -> None:
    """What the child runs: ``shared FD FD FD`` or ``tcp PORT``."""
    wire, *numbers = sys.argv[1:]
    options: ChannelOptions = {"registry": KINDS}
    if wire == "shared":
        fds = (int(numbers[0]), int(numbers[1]), int(numbers[2]))
        channel: Channel = SharedMemoryChannel.from_fds(fds, ARENA_BYTES, "host", "owner", **options)
    else:
        sock = connect("127.0.0.1", int(numbers[0]), token_handshake(TOKEN, listening=False))
        channel = SocketChannel(sock, "host", "owner", **options)
    echo(channel)
    time.sleep(60)  # until it is killed


def start_child(wire: str) -> tuple[subprocess.Popen[bytes], SocketChannel]:
    command = [sys.executable, "-c", "import test_channel; test_channel.echo_process()", wire]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in (str(Path(__file__).parent), *sys.path))}
    options: ChannelOptions = {"registry": KINDS}
    if wire == "shared":
        ours, theirs = open_link(ARENA_BYTES)
        child = subprocess.Popen([*command, *map(str, theirs)], pass_fds=theirs, env=environment)
        for descriptor in theirs:
            os.close(descriptor)
        return child, SharedMemoryChannel.from_fds(ours, ARENA_BYTES, "owner", "host", **options)
    with listen_loopback() as listener:
        child = subprocess.Popen([*command, str(listener.getsockname()[1])], env=environment)
        sock = accept(listener, token_handshake(TOKEN, listening=True), timeout=60)
    return child, SocketChannel(sock, "owner", "host", **options)


@pytest.mark.parametrize("wire", ["shared", "tcp"])
def test_a_second_process_answers_and_its_death_is_noticed(wire: str) -> None:
    child, channel = start_child(wire)
    try:
        with channel:
            for number, size in enumerate((0, 3, 700, 1200, 5, 50_000, 1249)):
                channel.send(box(number, size, 1))
                assert_same(channel.recv(60), box(number, size, 1))
            channel.send(Bye())
            threading.Timer(0.2, child.kill).start()
            with pytest.raises(PeerLostError, match="the host closed its link"):
                channel.recv(30)
    finally:
        child.kill()
        child.wait()
