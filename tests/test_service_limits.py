"""What a service takes and what it does not, before any model is loaded: addresses, floods, openings, links."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import make_config
from veiltune.config import Config
from veiltune.designs import DESIGNS
from veiltune.errors import CheckpointError, ConfigError, PeerLostError, ProtocolError, VeiltuneError
from veiltune.parties.party import Job
from veiltune.session.dialling import check_connect, dial, is_exposed, local_roles
from veiltune.session.opening import job_of, numbered
from veiltune.session.service import MAX_HANDSHAKES, Service, parse_address
from veiltune.session.wiring import channel_options
from veiltune.transport.channel import memory_pair
from veiltune.transport.messages import Acknowledged, Goodbye, OpenSession, Refused, StopSoon
from veiltune.transport.session_link import SessionLink
from veiltune.transport.stream import NamedSocket, SocketChannel, is_loopback, shake_hands, token_handshake

HERE = ("127.0.0.1", 0)
NUMBER, OTHER_NUMBER = 32 * "a", 32 * "b"


def config_of(directory: Path, role: str, **session: Any) -> Config:
    table = {"processes": True, "token_file": str(directory / "token"), "retry_seconds": 5.0, **session}
    return make_config("obfuscatune", "llama", directory / role, session=table)


class Running:
    """A service in a thread, and what it tells."""

    def __init__(self, config: Config, role: str) -> None:
        self.config = config
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.service = Service(config, role, HERE, lambda name, fields: self.events.append((name, fields)))
        self.thread = threading.Thread(target=self.service.run, daemon=True)
        self.thread.start()
        self.until(lambda: "listening" in self.names())

    @property
    def address(self) -> tuple[str, int]:
        return parse_address(self.service.address)

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.events
            time.sleep(0.01)

    def link(self, me: str, peer: str) -> SessionLink:
        """An end of a link to it."""
        connected = {"connect": {peer: self.service.address}}
        config = self.config.model_copy(update={"session": self.config.session.model_copy(update=connected)})
        return SessionLink(dial(config, peer, channel_options(DESIGNS["obfuscatune"], me, peer, ()), me=me))


@contextmanager
def running(config: Config, role: str) -> Generator[Running]:
    made = Running(config, role)
    try:
        yield made
    finally:
        made.service.stop()
        made.thread.join(20)
        assert not made.thread.is_alive()


def opening(config: Config, **changes: Any) -> OpenSession:
    plain = OpenSession(NUMBER, OTHER_NUMBER, "tune", False, None, 0, config.fingerprint())
    return replace(plain, **changes)


# --- addresses --------------------------------------------------------------------------------------------------------


EVERYWHERE = "0.0.0.0"  # noqa: S104 - what is to be refused
STAYS = ("127.0.0.1", "::1", "localhost", "127.8.0.9")
LEAVES = (EVERYWHERE, "::", "10.0.0.7", "localhost.example")


@pytest.mark.parametrize(("host", "stays"), [*((host, True) for host in STAYS), *((host, False) for host in LEAVES)])
def test_what_never_leaves_this_machine(host: str, stays: bool, tmp_path: Path) -> None:
    assert is_loopback(host) is stays
    config = config_of(tmp_path, "host")
    if stays:
        assert is_exposed(config, host) is False
    else:
        with pytest.raises(ConfigError, match="nothing would be encrypted") as caught:
            is_exposed(config, host)
        assert "keygen" in str(caught.value.hint)
        assert is_exposed(config_of(tmp_path, "host", allow_unauthenticated=True), host) is True


def test_beyond_this_machine_a_token_alone_will_not_do_unless_told_and_then_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'0\.0\.0\.0' is beyond this machine"):
        Service(config_of(tmp_path, "host"), "host", (EVERYWHERE, 0), lambda *_: None)
    config = config_of(tmp_path, "owner", connect={"provider": "192.0.2.1:7431", "enclave": "127.0.0.1:1"})
    with pytest.raises(ConfigError, match=r"'192\.0\.2\.1' is beyond this machine"):
        check_connect(config, DESIGNS["obfuscatune"])
    events: list[Any] = []
    allowed = config_of(tmp_path, "host", allow_unauthenticated=True)
    service = Service(allowed, "host", (EVERYWHERE, 0), lambda *event: events.append(event))
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    while not events:
        time.sleep(0.01)
    service.stop()
    thread.join(10)
    assert "NOTHING IS ENCRYPTED" in events[0][1]["guard"]


CONNECTS: list[tuple[dict[str, str], tuple[str, ...] | str]] = [
    ({}, ("owner", "provider", "enclave", "host")),
    ({"provider": "127.0.0.1:1", "enclave": "127.0.0.1:2"}, ("owner",)),
    ({"enclave": "127.0.0.1:2"}, ("owner", "provider")),
    ({"host": "127.0.0.1:3"}, ("owner", "provider", "enclave")),
    ({"provider": "127.0.0.1:1"}, "names the provider, which links up with the enclave, and not the enclave"),
    ({"owner": "127.0.0.1:1"}, "has no 'owner' that runs as a service"),
]


@pytest.mark.parametrize(("connect", "expected"), CONNECTS)
def test_which_parties_are_started_here(connect: dict[str, str], expected: Any, tmp_path: Path) -> None:
    config, design = config_of(tmp_path, "owner", connect=connect), DESIGNS["obfuscatune"]
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            check_connect(config, design)
    else:
        check_connect(config, design)
        assert sorted(local_roles(config, design)) == sorted(expected)


def test_a_service_needs_the_addresses_of_those_it_links_up_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not name the host, with which this enclave links up") as caught:
        Service(config_of(tmp_path, "enclave"), "enclave", HERE, lambda *_: None)
    assert "host = " in str(caught.value.hint)


@pytest.mark.parametrize(("address", "message"), [("0.0.0.0:0", "reachable from other"), ("here", "is no address")])
def test_health_is_told_on_this_machine_alone(address: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        Service(config_of(tmp_path, "host", health=address), "host", HERE, lambda *_: None)


def test_health_before_while_and_after(tmp_path: Path) -> None:
    def ask(address: str, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    with running(config_of(tmp_path, "host", health="127.0.0.1:0"), "host") as made:
        address = made.events[0][1]["health"]
        made.until(lambda: ask(address, "/readyz") == 200)
        assert [ask(address, path) for path in ("/healthz", "/metrics", "/other")] == [200, 200, 404]
        made.service.health.is_ready = False
        assert [ask(address, path) for path in ("/healthz", "/readyz")] == [200, 503]
    with pytest.raises(OSError, match=r"refused"):
        urllib.request.urlopen(f"http://{address}/healthz", timeout=5)


# --- floods -----------------------------------------------------------------------------------------------------------


def test_a_flood_of_connections_costs_a_bounded_number_of_threads(tmp_path: Path) -> None:
    """Silent connections hold a thread each until their time is up; beyond the bound they are closed unread."""
    with running(config_of(tmp_path, "host"), "host") as made:
        before = threading.active_count()
        flood = [socket.create_connection(made.address, timeout=5) for _ in range(2 * MAX_HANDSHAKES)]
        made.until(lambda: made.names().count("turned_away") == MAX_HANDSHAKES)
        assert threading.active_count() - before == MAX_HANDSHAKES
        assert "proving themselves already" in made.events[-1][1]["why"]
        for sock in flood:
            sock.close()
        made.until(lambda: made.names().count("turned_away") == 2 * MAX_HANDSHAKES)
        link = made.link("enclave", "host")
        link.send(opening(made.config, session="x"))
        with pytest.raises(ProtocolError, match="without the numbers"):
            link.recv(10)
        link.close()


# --- openings ---------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"session": "../../etc"}, "without the numbers"),
    ({"run": NUMBER[:-1] + "/"}, "without the numbers"),
    ({"agreed": 64 * "0"}, "another configuration, 0000"),
    ({"verb": "destroy"}, "'destroy' at step None"),
    ({"resume_step": -1}, "at step -1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_an_opening_that_is_not_in_order(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, "host")
    assert job_of(opening(config), config) == Job(verb="tune", session=NUMBER, run=OTHER_NUMBER)
    with pytest.raises(ProtocolError, match=message):
        job_of(opening(config, **changes), config)


def test_a_host_refuses_in_its_own_words_and_takes_the_next(tmp_path: Path) -> None:
    with running(config_of(tmp_path, "host"), "host") as made:
        for changes, message in BAD[2:4]:
            link = made.link("enclave", "host")
            link.send(opening(made.config, **changes))
            with pytest.raises(ProtocolError, match=f"the host ended the session: .*{message}"):
                link.recv(10)
            link.close()
        link = made.link("enclave", "host")
        link.send(opening(made.config, resume_step=3))
        assert isinstance(link.recv(10), Acknowledged)
        link.close()
        made.until(lambda: made.names().count("refused") == 2 and "owner_gone" in made.names())
        assert not any((Path(made.config.output) / "parties" / "host").iterdir()), (
            "a run without a checkpoint leaves none"
        )


def test_links_of_a_session_meet_and_others_do_not(tmp_path: Path) -> None:
    """At an enclave whose host is not up: what comes together is refused for that reason, what does not for another."""
    with socket.create_server(HERE) as nobody:
        unused = f"127.0.0.1:{nobody.getsockname()[1]}"
    config = config_of(tmp_path, "enclave", connect={"host": unused}, retry_seconds=0.5)

    def meet(made: Running, *openings: tuple[str, OpenSession]) -> list[str]:
        links = [made.link(role, "enclave") for role, _ in openings]
        for link, (_, said) in zip(links, openings, strict=True):
            link.send(said)
            time.sleep(0.1)
        found: list[str] = []
        for link in links:
            with pytest.raises(VeiltuneError) as caught:
                link.recv(20)
            found.append(caught.value.message)
            link.close()
        return found

    with running(config, "enclave") as made:
        said = opening(config)
        together = meet(made, ("owner", said), ("provider", said))
        assert all("the host is not to be reached" in each for each in together)
        (alone,) = meet(made, ("owner", said))
        assert "the provider did not come to this session within 0.5 s" in alone
        first, second = meet(made, ("owner", said), ("provider", replace(said, resume_step=4)))
        assert "do not say the same" in second
        assert "did not come" in first
        first, second = meet(made, ("owner", said), ("owner", said))
        assert "has its owner already" in second
        apart = meet(made, ("owner", said), ("provider", replace(said, session=OTHER_NUMBER)))
        assert ["did not come" in each for each in apart] == [True, True]


def test_only_jobs_for_services_that_need_them_are_numbered(tmp_path: Path) -> None:
    plain, job = config_of(tmp_path, "owner"), Job(verb="tune")
    assert numbered(plain, job) is job
    config = config_of(tmp_path, "owner", connect={"provider": "127.0.0.1:1", "enclave": "127.0.0.1:2"})
    first, second = numbered(config, job), numbered(config, job)
    assert first.run == second.run
    assert first.session != second.session
    (Path(config.output) / "run.id").write_text("../up\n")
    with pytest.raises(ConfigError, match="holds no number of a run"):
        numbered(config, job)


# --- links ------------------------------------------------------------------------------------------------------------


def test_a_refusal_is_raised_as_what_it_was_and_a_stop_is_heard_beside_the_answers() -> None:
    mine, theirs = memory_pair("owner", "enclave")
    link, heard = SessionLink(mine), []
    link.on_stopping = lambda: heard.append(1)
    for message in (StopSoon(), Acknowledged(), StopSoon(), Goodbye()):
        theirs.send(message)
    assert [type(link.recv(1)) for _ in range(2)] == [Acknowledged, Goodbye]
    assert link.stopping
    assert heard == [1]
    for name, kind in (("CheckpointError", CheckpointError), ("os", ProtocolError), ("Oops", ProtocolError)):
        theirs.send(Refused(name, "no state of step 3", "start anew"))
        with pytest.raises(VeiltuneError, match="the enclave ended the session: no state of step 3") as caught:
            link.recv(1)
        assert type(caught.value) is kind
        assert caught.value.hint == "start anew"


def test_who_is_being_stopped_says_so_once_after_an_answer() -> None:
    mine, theirs = memory_pair("enclave", "owner")
    link = SessionLink(mine)
    link.send(Acknowledged())
    link.tell_to_stop()
    link.send(Acknowledged())
    link.send(Acknowledged())
    kinds = [type(theirs.recv(1)) for _ in range(4)]
    assert kinds == [Acknowledged, Acknowledged, StopSoon, Acknowledged]


def test_a_link_is_ended_from_another_thread() -> None:
    one, other = socket.socketpair()
    with SocketChannel(one, "enclave", "owner") as mine, SocketChannel(other, "owner", "enclave"):
        link = SessionLink(mine)
        threading.Timer(0.2, link.abort).start()
        with pytest.raises(PeerLostError):
            link.recv(10)


@pytest.mark.parametrize(
    ("name", "key", "found"), [("provider", b"k", "provider"), ("host", b"k", None), ("owner", b"x", None)]
)
def test_a_token_proves_a_name_among_those_that_may_come(name: str, key: bytes, found: str | None) -> None:
    listener = token_handshake(32 * b"k", listening=True, names=("owner", "provider"))
    near, far = socket.socketpair()
    came: list[Any] = []

    def listen() -> None:
        with suppress(ProtocolError):
            came.append(shake_hands(far, listener, 5))

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        with shake_hands(near, token_handshake(32 * key, listening=False, names=(name,)), 5):
            pass
    except ProtocolError:
        assert found is None
    thread.join(10)
    assert [sock.role for sock in came if isinstance(sock, NamedSocket)] == ([found] if found else [])
    for sock in came:
        sock.close()
