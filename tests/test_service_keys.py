"""A service with keys: who is let in, what differs in what is agreed on, and what the enclave's evidence is bound to."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from helpers import make_config
from veiltune.config import Config
from veiltune.designs import DESIGNS
from veiltune.errors import ConfigError, ProtocolError
from veiltune.parties.party import _keys_of
from veiltune.peers import digest_of
from veiltune.session.dialling import dial
from veiltune.session.service import Service
from veiltune.session.wiring import channel_options
from veiltune.transport.identity import make_identity, private_file
from veiltune.transport.session_link import SessionLink

ROLES = ("owner", "provider", "enclave", "host")


class Keys:
    """Keys of four parties and of a stranger, and configurations with them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pins = {role: make_identity(directory, role).pin for role in ROLES}
        self.stranger = make_identity(directory / "stranger", "enclave").pin

    def config(self, role: str, key: Path | None = None, **tables: Any) -> Config:
        values: dict[str, Any] = {
            "identity": {"key": str(key or private_file(self.directory, role))},
            "peers": [{"role": each, "key": pin} for each, pin in self.pins.items()],
            "session": {"processes": True, "retry_seconds": 2.0, "connect": {}},
        }
        return make_config("obfuscatune", "llama", self.directory / role, **{**values, **tables})


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture
def host(keys: Keys) -> Generator[tuple[Service, list[tuple[str, dict[str, Any]]]]]:
    events: list[tuple[str, dict[str, Any]]] = []
    service = Service(keys.config("host"), "host", ("127.0.0.1", 0), lambda name, fields: events.append((name, fields)))
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    while not events:
        time.sleep(0.01)
    yield service, events
    service.stop()
    thread.join(20)
    assert not thread.is_alive()


def link_to(service: Service, config: Config, me: str = "enclave") -> SessionLink:
    session = config.session.model_copy(update={"connect": {"host": service.address}})
    options = channel_options(DESIGNS["obfuscatune"], me, "host", ())
    return SessionLink(dial(config.model_copy(update={"session": session}), "host", options, me=me))


def test_the_enclave_is_let_in_and_its_evidence_names_both_keys(keys: Keys, host: Any) -> None:
    service, events = host
    assert events[0][1]["guard"].startswith("TLS")
    link = link_to(service, keys.config("enclave", seed=9, train={"steps": 77}))
    assert _keys_of(link) == (digest_of(keys.pins["enclave"]), digest_of(keys.pins["host"]))
    assert link.pin == keys.pins["host"]
    link.close()


DIFFERENT: dict[str, dict[str, Any]] = {
    "design's option": {"obfuscatune": {"placement": "paper"}},
    "dtype": {"dtype": "float64"},
    "optimiser": {"train": {"optimizer": "adamw"}},
    "a rank more": {"lora": {"rank": 5}},
    "no simulated enclave": {"enclave": {"allow_simulated": False}},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_agreed_on_differs(name: str, keys: Keys, host: Any) -> None:
    service, events = host
    with pytest.raises(ProtocolError, match="the host has another configuration"):
        link_to(service, keys.config("enclave", **DIFFERENT[name]))
    deadline = time.monotonic() + 10
    while len(events) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert events[1][0] == "turned_away"
    assert "the enclave has another configuration" in events[1][1]["why"]


def test_a_stranger_and_a_party_in_anothers_role(keys: Keys, host: Any) -> None:
    service, _ = host
    peers = [{"role": role, "key": pin} for role, pin in keys.pins.items() if role != "enclave"]
    stranger = private_file(keys.directory / "stranger", "enclave")
    theirs = keys.config("enclave", key=stranger, peers=[*peers, {"role": "enclave", "key": keys.stranger}])
    with pytest.raises(ProtocolError, match=f"does not know the key of this enclave, {keys.stranger}"):
        link_to(service, theirs)
    with pytest.raises(ProtocolError, match=r"does not let the key .* act as owner"):
        link_to(service, keys.config("owner"), me="owner")


def test_another_partys_key_is_noticed_at_the_start(keys: Keys) -> None:
    with pytest.raises(ConfigError, match="is the owner's, and this is the host"):
        Service(
            keys.config("host", key=private_file(keys.directory, "owner")), "host", ("127.0.0.1", 0), lambda *_: None
        )
