"""The provider's trunk server and the owner's way to it: sessions, bounds, everything that can be wrong with a message."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import helpers
from cutting import (
    CUT,
    WIRE,
    Client,
    Running,
    connected,
    cut_config,
    deep_model,
    own_here,
    plan_of,
    provider_of,
    serving,
)
from helpers import tuned, write_examples
from veiltune.errors import FrameError, ModelError, PeerLostError, ProtocolError, VeiltuneError
from veiltune.parties.split import server as server_module
from veiltune.parties.split.plan import SplitPlan, require_agreement, terms_of
from veiltune.parties.split.port import RefusedError, WirePort, expect
from veiltune.parties.split.provider import Provider
from veiltune.parties.split.server import TrunkServer, TrunkSession
from veiltune.privacy.quantisation import WireCodec, WireOptions
from veiltune.session import PartyFailure
from veiltune.session.service import Service, parse_address, read_token
from veiltune.training import COMMIT
from veiltune.transport.channel import memory_pair
from veiltune.transport.messages import (
    Forget,
    Goodbye,
    OptimizerStep,
    PlugIn,
    Refused,
    SplitAccepted,
    SplitRequest,
    TrunkBackward,
    TrunkForward,
    TrunkGradient,
    TrunkOutput,
)
from veiltune.transport.stream import SocketChannel, connect, token_handshake

WIDTH = 32
EXACTLY = WireCodec(32, WireOptions())
TRAIN: dict[str, Any] = {"steps": 12, "optimizer": "adamw", "learning_rate": 3e-3, "batch_size": 4}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEILTUNE_CACHE", str(helpers.scratch() / "cache"))


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Provider:
    """A provider of `split`, its trunk loaded once for all tests that only ask."""
    return provider_of(cut_config("split", tmp_path_factory.mktemp("provider")))


@pytest.fixture
def client(provider: Provider) -> Generator[Client]:
    """An owner whose session is open."""
    made = Client(provider)
    agree(made)
    yield made
    made.close()
    assert provider.server.sessions == {}


def terms(provider: Provider, **changes: Any) -> dict[str, Any]:
    """What an owner with the same configuration asks for, but for ``changes``."""
    asked = terms_of(provider.config, provider.plan, pins={})
    return {**asked, **changes}


def agree(client: Client, **changes: Any) -> None:
    client.link.send(SplitRequest(terms(client.provider, **changes), with_layers=False))
    expect(client.link.recv(5), SplitAccepted)


def session_of(client: Client) -> TrunkSession:
    (session,) = client.provider.server.sessions.values()
    return session


def states(batch: int = 2, seq: int = 5, *, seed: int = 0, width: int = WIDTH) -> Tensor:
    return torch.randn(batch, seq, width, generator=torch.Generator().manual_seed(seed))


def forward(
    ticket: int, hidden: Tensor | None = None, *, encoded: Tensor | None = None, **changes: Any
) -> TrunkForward:
    if encoded is None:
        encoded = EXACTLY.encode(states() if hidden is None else hidden)
    fields: dict[str, Any] = {
        "cache_id": 0,
        "keep": True,
        "training": True,
        "attention_mask": None,
        "position_ids": None,
        **changes,
    }
    return TrunkForward(ticket, hidden=encoded, **fields)


def backward(ticket: int, gradient: Tensor | None = None) -> TrunkBackward:
    return TrunkBackward(ticket, EXACTLY.encode(states(seed=1) if gradient is None else gradient))


def ask(client: Client, *messages: Any) -> Any:
    """Send messages, and return the last one's answer."""
    answer: Any = None
    for message in messages:
        client.link.send(message)
        answer = client.link.recv(10)
    return answer


def refusal(client: Client, *messages: Any) -> Refused:
    """The refusal that the last message meets. It ends the session, and says so in order."""
    answer = ask(client, *messages)
    assert isinstance(answer, Refused), answer
    with pytest.raises(PeerLostError):
        client.link.recv(10)
    client.thread.join(10)
    assert client.provider.server.sessions == {}
    (error,) = client.errors
    assert isinstance(error, VeiltuneError)
    assert error.message == answer.message
    return answer


# --- the handshake ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "asked", "served"),
    [
        ("model", "another/model", None),
        ("weights", "00ff", None),
        ("vocabulary", 50257, "259"),
        ("cut.bottom_layers", 2, "1"),
        ("cut.top_layers", 3, "1"),
        ("dtype", "float64", "'float32'"),
        ("design", "online", "'split'"),
        ("protocol", 0, "1"),
        ("plug_in", True, "False"),
        ("wire", WireOptions(activation_bits=8).model_dump(mode="json"), None),
        ("emulator", {"kind": "layerdrop"}, "None"),
        ("favourite", 1, None),
    ],
)
def test_a_client_that_wants_something_else_is_refused_by_name(
    provider: Provider, item: str, asked: Any, served: str | None
) -> None:
    made = Client(provider)
    refused = refusal(made, SplitRequest(terms(provider, **{item: asked}), with_layers=True))
    assert refused.error == "ProtocolError"
    assert item in refused.message
    if item != "favourite":
        assert repr(asked)[:40] in refused.message, "what was asked for"
        assert (served or repr(provider.terms()[item])[:40]) in refused.message, "and what is served"
    assert refused.hint
    made.close()


def test_a_client_that_leaves_weights_and_vocabulary_open_is_served(provider: Provider) -> None:
    for pins in ({}, {"weights": provider.card.fingerprint, "vocabulary": 259}):
        made = Client(provider)
        agree(made, **pins)
        assert isinstance(ask(made, forward(1)), TrunkOutput)
        made.close()


@pytest.mark.parametrize(
    "message", [Goodbye(), Forget(0), forward(1), PlugIn("lora", {})], ids=lambda message: type(message).__name__
)
def test_nothing_is_answered_before_there_is_agreement(provider: Provider, message: Any) -> None:
    made = Client(provider)
    made.link.send(message)
    with suppress(PeerLostError):
        assert isinstance(made.link.recv(10), Refused)
    made.close()
    assert made.errors
    assert isinstance(made.errors[0], ProtocolError)


def test_an_owner_that_differs_is_told_by_its_own_session(tmp_path: Path) -> None:
    """End to end: the owner of one configuration at the service of another."""
    data = {"train": str(write_examples(tmp_path / "train.jsonl", 4))}
    token = {"token_file": str(tmp_path / "token")}
    with serving(cut_config("split", tmp_path / "provider", session=token)) as running:
        config = connected("split", tmp_path / "owner", running, data=data, cut={"bottom_layers": 2, "top_layers": 1})
        with pytest.raises(RefusedError, match=r"cut\.bottom_layers = 2, this provider serves 1") as caught:
            own_here(config)
        assert "both configurations" in str(caught.value.hint)
        wire = {"activation_bits": 8, "gradient_bits": 8}
        with pytest.raises(RefusedError, match=r"design = 'online', this provider serves 'split'"):
            own_here(connected("online", tmp_path / "online", running, data=data, online={"wire": wire}))
    assert running.names().count("refused") == 2


@pytest.mark.parametrize(
    ("design", "changes", "item"),
    [
        ("online", {"wire": {**WIRE, "gradient_bits": 8}}, "wire"),
        ("online", {"wire": {**WIRE, "rotate": False}}, "wire"),
        ("offsite", {"emulator": {"layers": 2}}, "emulator"),
        ("offsite", {"emulator": {"kind": "lowrank", "rank": 0.5}}, "emulator"),
        ("offline", {"plug_in": True}, "plug_in"),
        ("offsite", {"emulator": {"kind": "distilled"}}, "emulator"),
        ("online", {"decorrelation": {"alpha": 3.0}}, None),
        ("split", {"server": {"max_pending": 9}}, None),
    ],
)
def test_terms_are_what_both_must_have_and_nothing_else(
    design: str, changes: dict[str, Any], item: str | None, tmp_path: Path
) -> None:
    """Decorrelation is the owner's own affair and the server's bounds the provider's."""
    ours, theirs = cut_config(design, tmp_path), cut_config(design, tmp_path, None, **{design: changes})
    served = terms_of(ours, plan_of(ours), pins={"weights": "ab", "vocabulary": 3})
    asked = terms_of(theirs, plan_of(theirs), pins={})
    if item is None:
        require_agreement(asked, served)
        return
    with pytest.raises(ProtocolError, match=f"asks for {item} = "):
        require_agreement(asked, served)


@pytest.mark.parametrize(("plug_in", "agrees"), [(True, False), (False, True)])
def test_the_adapters_scale_is_agreed_on_where_the_provider_is_to_merge_it(
    plug_in: bool, agrees: bool, tmp_path: Path
) -> None:
    table = {"plug_in": plug_in}
    ours = cut_config("offsite", tmp_path, offsite=table, lora={"alpha": 8.0})
    theirs = cut_config("offsite", tmp_path, offsite=table, lora={"alpha": 16.0})
    served = terms_of(ours, plan_of(ours), pins={"weights": "ab", "vocabulary": 3})
    asked = terms_of(theirs, plan_of(theirs), pins={})
    if agrees:
        require_agreement(asked, served)
    else:
        with pytest.raises(ProtocolError, match=r"asks for lora = .*16\.0.* serves .*8\.0"):
            require_agreement(asked, served)


def test_a_model_that_remembers_texts_is_not_served_to_many(tmp_path: Path) -> None:
    """Rotary tables of the dynamic kind grow with the longest text of anybody."""
    directory = tmp_path / "model"
    shutil.copytree(deep_model(), directory)
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    values["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    config = cut_config("split", tmp_path / "run", str(directory), session={"token_file": str(tmp_path / "token")})
    service = Service(config, "provider", ("127.0.0.1", 0), lambda *_: None)
    with helpers.own_cache(), pytest.raises(ModelError, match="'dynamic'"):
        service.run()


# --- a step ----------------------------------------------------------------------------------------------------------


def test_the_server_computes_the_trunk_and_its_gradient(client: Client) -> None:
    hidden, gradient = states().requires_grad_(), states(seed=1)
    expected = client.provider.server.trunk.forward(hidden, None, None, None, training=False)
    (wanted,) = torch.autograd.grad(expected, hidden, gradient)
    output = expect(ask(client, forward(1)), TrunkOutput)
    assert output.ticket == 1
    assert torch.equal(EXACTLY.decode(output.hidden), expected.detach())
    assert list(session_of(client).pending) == [1]
    answer = expect(ask(client, backward(1)), TrunkGradient)
    assert answer.ticket == 1
    assert helpers.relative_error(EXACTLY.decode(answer.gradient), wanted) < 1e-6
    assert session_of(client).pending == {}


def test_what_is_not_kept_leaves_nothing(client: Client) -> None:
    ask(client, forward(1, keep=False), forward(2, keep=True), forward(3, keep=False))
    assert list(session_of(client).pending) == [2]
    client.link.send(Forget(0))
    ask(client, forward(4, keep=False))
    assert session_of(client).pending == {}


def test_a_backward_is_answered_once(client: Client) -> None:
    refused = refusal(client, forward(1), backward(1), backward(1))
    assert "no forward 1 is pending" in refused.message
    assert refused.hint == "send the forward again"


# --- malformed, reordered, oversized ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ticket", [1, 0, -3])
def test_a_forward_out_of_order_is_refused(client: Client, ticket: int) -> None:
    assert f"forward {ticket} came after 1" in refusal(client, forward(1), forward(ticket)).message


def damaged(change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(EXACTLY.encode(states()))


def poked(payload: Tensor, at: int, value: bytes) -> Tensor:
    made = payload.clone()
    made[at : at + len(value)] = torch.tensor(list(value), dtype=torch.uint8)
    return made


NAN, INFINITY = struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))
PAYLOADS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "truncated": (lambda whole: whole[:-4], "takes"),
    "a stub": (lambda whole: whole[:5], "truncated: 5 bytes"),
    "nothing": (lambda whole: whole[:0], "truncated: 0 bytes"),
    "too long": (lambda whole: torch.cat([whole, whole[:4]]), "takes"),
    "another magic": (lambda whole: poked(whole, 0, b"XX"), "magic b'XX'"),
    "another width of bits": (lambda whole: poked(whole, 3, b"\x08"), "where"),
    "a huge shape": (lambda whole: poked(whole, 12, b"\xff\xff\xff\xff"), "takes"),
    "floats": (lambda whole: whole.float(), "vector of bytes"),
    "NaN": (lambda whole: poked(whole, 24 + 40, NAN), "not finite"),
    "infinity": (lambda whole: poked(whole, 24 + 40, INFINITY), "not finite"),
}


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_states_and_gradients_that_are_malformed_are_refused(client: Client, direction: str, name: str) -> None:
    change, words = PAYLOADS[name]
    payload = damaged(change)
    if direction == "forward":
        refused = refusal(client, forward(1, encoded=payload))
    else:
        refused = refusal(client, forward(1), TrunkBackward(1, payload))
    assert refused.error == "ProtocolError"
    assert words in refused.message
    assert ("activations" if direction == "forward" else "gradients") in refused.message


@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        (states(width=16), "have shape (2, 5, 16), not (batch, seq, 32)"),
        (states()[0], "have shape (5, 32)"),
        (states().unsqueeze(0), "have shape (1, 2, 5, 32)"),
        (states().double(), "torch.float64"),
    ],
)
def test_states_of_another_shape_are_refused(client: Client, hidden: Tensor, words: str) -> None:
    assert words in refusal(client, forward(1, hidden)).message


@pytest.mark.parametrize("shape", [(2, 4, WIDTH), (1, 5, WIDTH), (2, 5, WIDTH // 2), (5, WIDTH)])
def test_gradients_of_another_shape_are_refused(client: Client, shape: tuple[int, ...]) -> None:
    message = refusal(client, forward(1), backward(1, torch.ones(shape))).message
    assert str(shape) in message
    assert "the gradient of forward 1" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_mask": torch.ones(2, 3, dtype=torch.bool)}, "mask of shape (2, 3)"),
        ({"attention_mask": torch.ones(3, 5, dtype=torch.bool)}, "mask of shape (3, 5)"),
        ({"attention_mask": torch.ones(2, 9, dtype=torch.bool)}, "mask of shape (2, 9)"),
        ({"attention_mask": torch.ones(5, dtype=torch.bool)}, "mask of shape (5,)"),
        ({"position_ids": torch.arange(4).unsqueeze(0)}, "position ids of shape (1, 4)"),
        ({"position_ids": torch.arange(5)}, "position ids of shape (5,)"),
        ({"position_ids": torch.rand(1, 5)}, "torch.float32"),
        ({"cache_id": -1}, "cache -1"),
    ],
)
def test_a_context_that_does_not_fit_is_refused(client: Client, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(client, forward(1, **changes)).message


def test_a_message_that_is_not_in_the_table_ends_the_session(client: Client) -> None:
    refused = refusal(client, OptimizerStep(0.1, 1.0))
    assert "may not receive OptimizerStep" in refused.message


@pytest.mark.parametrize(("design", "message"), [("split", "PlugIn"), ("offline", "PlugIn")])
def test_what_was_not_agreed_on_is_refused(design: str, message: str, tmp_path: Path) -> None:
    """`split` has no such message; `offline` has it, and by default the owner keeps what it trained."""
    made = Client(provider_of(cut_config(design, tmp_path)))
    agree(made)
    assert message in refusal(made, PlugIn("lora", {})).message or design == "offline"
    assert not (tmp_path / "parties" / "provider" / "plug-in").exists()
    made.close()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"model.layers.0.self_attn.q_proj.lora_A": torch.full((4, 32), float("nan"))}, "is not finite"),
        ({"model.layers.0.self_attn.q_proj.lora_A": torch.ones(3, 32)}, r"is no LoRA factor"),
        ({"model.layers.9.self_attn.q_proj.lora_A": torch.ones(4, 32)}, r"is no LoRA factor"),
        ({"model.embed_tokens.weight": torch.ones(259, 32)}, r"is no LoRA factor"),
        # The trunk is the provider's own; an owner returns factors of its layers alone.
        ({"model.layers.2.self_attn.q_proj.lora_A": torch.ones(4, 32)}, r"is no LoRA factor"),
        ({"model.layers.0.self_attn.q_proj.lora_A": torch.ones(4, 31)}, r"is no LoRA factor"),
    ],
)
def test_a_result_that_has_no_place_in_the_model_is_not_plugged_in(
    tensors: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    made = Client(provider_of(cut_config("offsite", tmp_path)))
    agree(made)
    assert words in refusal(made, PlugIn("lora", tensors)).message
    assert not (tmp_path / "parties" / "provider" / "plug-in").exists()
    made.close()


# --- over a real socket ----------------------------------------------------------------------------------------------


@pytest.fixture
def service(tmp_path: Path) -> Generator[Running]:
    with serving(
        cut_config("split", tmp_path / "provider", session={"token_file": str(tmp_path / "token")})
    ) as running:
        yield running


def wire_to(running: Running) -> SocketChannel:
    """An authenticated link that nothing guards."""
    token = read_token(Path(str(running.config.session.token_file)), create=False)
    sock = connect(*parse_address(running.address), token_handshake(token, listening=False), 5)
    return SocketChannel(sock, "owner", "provider")


def opened(running: Running) -> SocketChannel:
    link = wire_to(running)
    plan = plan_of(running.config)
    link.send(SplitRequest(terms_of(running.config, plan, pins={}), with_layers=False))
    expect(link.recv(10), SplitAccepted)
    return link


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


GARBAGE = {
    "noise": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4,
    "zeros": bytes(256),
    "a length beyond all bounds": b"\xff" * 256,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_bytes_that_are_no_frame_end_that_session_alone(service: Running, name: str) -> None:
    other, bad = opened(service), opened(service)
    bad._sock.setblocking(True)
    bad._sock.sendall(GARBAGE[name])
    with suppress(PeerLostError, FrameError):
        assert isinstance(bad.recv(10), Refused)
    until(lambda: "refused" in service.names())
    other.send(forward(1))
    assert isinstance(other.recv(10), TrunkOutput), "whoever is there besides goes on"
    for link in (other, bad):
        link.close()


def test_a_frame_that_breaks_off_counts_as_an_owner_that_vanished(service: Running) -> None:
    other, bad = opened(service), opened(service)
    from veiltune.transport.codec import encode

    frame = encode(forward(1))
    bad._sock.setblocking(True)
    bad._sock.sendall(bytes(frame.head)[: len(bytes(frame.head)) - 3])
    bad.close()
    until(lambda: "owner_gone" in service.names())
    other.send(forward(1))
    assert isinstance(other.recv(10), TrunkOutput)
    other.close()


def test_an_owner_that_vanishes_leaves_nothing(tmp_path: Path) -> None:
    """In the middle of a step, with a graph and a cache at the provider; another's are untouched."""
    provider = provider_of(cut_config("split", tmp_path))
    staying, leaving = Client(provider), Client(provider)
    agree(staying)
    agree(leaving)
    mine, theirs = provider.server.sessions.values()
    ask(staying, forward(1))
    ask(leaving, forward(1), forward(2, keep=False, training=False, cache_id=1))
    assert (list(theirs.pending), list(theirs.caches)) == ([1], [1])
    leaving.close()
    assert list(provider.server.sessions.values()) == [mine]
    assert (len(theirs.pending), len(theirs.caches)) == (0, 0)
    assert isinstance(leaving.errors[0], PeerLostError)
    assert isinstance(ask(staying, backward(1)), TrunkGradient)
    staying.close()


# --- bounds ----------------------------------------------------------------------------------------------------------


def bounded(tmp_path: Path, **server: Any) -> Provider:
    return provider_of(cut_config("split", tmp_path, split={"server": server}))


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_more_pending_forwards_than_allowed_drop_the_oldest(activations: str, tmp_path: Path) -> None:
    made = Client(bounded(tmp_path, max_pending=2, activations=activations))
    agree(made)
    ask(made, forward(1), forward(2), forward(3))
    assert list(session_of(made).pending) == [2, 3]
    assert isinstance(ask(made, backward(3)), TrunkGradient)
    assert isinstance(ask(made, backward(2)), TrunkGradient)
    refused = refusal(made, backward(1))
    assert "no forward 1 is pending" in refused.message
    assert "2 others" in refused.message
    made.close()


def test_a_pending_forward_may_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Client(bounded(tmp_path, pending_seconds=30.0))
    agree(made)
    now = time.monotonic()

    class Clock:
        later = 0.0

        @classmethod
        def monotonic(cls) -> float:
            return now + cls.later

    monkeypatch.setattr(server_module, "time", Clock)
    ask(made, forward(1))
    Clock.later = 29.0
    assert isinstance(ask(made, forward(2), backward(1)), TrunkGradient)
    Clock.later = 29.0 + 31.0
    refused = refusal(made, backward(2))
    assert "no forward 2 is pending" in refused.message
    assert "30 s" in refused.message
    made.close()


def test_the_least_recently_used_cache_makes_room(tmp_path: Path) -> None:
    made = Client(bounded(tmp_path, max_caches=2))
    agree(made)
    quiet: dict[str, Any] = {"keep": False, "training": False}
    ask(made, forward(1, cache_id=1, **quiet), forward(2, cache_id=2, **quiet))
    one = states(2, 1, seed=5)
    ask(made, forward(3, one, cache_id=1, **quiet), forward(4, cache_id=3, **quiet))
    session = session_of(made)
    assert list(session.caches) == [1, 3], "2 was used longest ago"
    assert session.caches[1].get_seq_length() == 6
    made.link.send(Forget(3))
    ask(made, forward(5, one, cache_id=1, **quiet))
    assert list(session.caches) == [1]
    made.close()


def test_messages_of_too_many_tokens_are_refused(tmp_path: Path) -> None:
    provider = bounded(tmp_path, max_tokens=10)
    made = Client(provider)
    agree(made)
    assert isinstance(ask(made, forward(1, states(2, 5))), TrunkOutput)
    refused = refusal(made, forward(2, states(11, 1)))
    assert "11 x 1 tokens exceed 10" in refused.message
    assert refused.hint == "send smaller batches"
    made.close()


def test_a_cache_is_bounded_in_tokens_too(tmp_path: Path) -> None:
    """A generation may not grow without end: what is cached counts."""
    made = Client(bounded(tmp_path, max_tokens=12))
    agree(made)
    quiet: dict[str, Any] = {"keep": False, "training": False, "cache_id": 1}
    ask(made, forward(1, states(2, 5), **quiet), forward(2, states(2, 1), **quiet))
    assert "exceed 12" in refusal(made, forward(3, states(2, 1), **quiet)).message
    made.close()


def test_no_more_owners_than_allowed(tmp_path: Path) -> None:
    provider = bounded(tmp_path, max_sessions=1)
    first, second = Client(provider), Client(provider)
    agree(first)
    second.link.send(SplitRequest(terms(provider), with_layers=False))
    answer = second.link.recv(10)
    assert isinstance(answer, Refused)
    assert "serves 1 owners already" in answer.message
    assert answer.hint == "try again later"
    first.close()
    third = Client(provider)
    agree(third)
    for made in (second, third):
        made.close()


# --- isolation -------------------------------------------------------------------------------------------------------


def test_tickets_and_caches_of_one_session_mean_nothing_to_another(tmp_path: Path) -> None:
    provider = provider_of(cut_config("split", tmp_path))
    mine, theirs = Client(provider), Client(provider)
    agree(mine)
    agree(theirs)
    quiet: dict[str, Any] = {"keep": False, "training": False, "cache_id": 1}
    ask(mine, forward(1), forward(2, states(seed=3), **quiet))
    one = states(2, 1, seed=4)
    fresh = expect(ask(theirs, forward(1, one, **quiet)), TrunkOutput)
    alone = provider.server.trunk.forward(one, None, None, None, training=False)
    assert helpers.relative_error(EXACTLY.decode(fresh.hidden), alone) < 1e-6, "cache 1 is another one here"
    assert "no forward 1 is pending" in ask(theirs, backward(1)).message
    theirs.close()
    assert isinstance(ask(mine, backward(1)), TrunkGradient), "the other's attempt changed nothing"
    mine.close()


def with_four_owners(
    design: str, tmp_path: Path, model: str | None = None, **options: Any
) -> tuple[list[list[float]], list[list[float]], Running]:
    """Losses of four owners at once, with other data and seeds each; of the same alone; and the service."""
    session = {"token_file": str(tmp_path / "token")}
    tables = {design: options} if options else {}
    configs = [
        {
            "data": {"train": str(write_examples(tmp_path / f"{i}.jsonl", 10 + i, seed=i))},
            "train": {**TRAIN, "steps": 6 + i, "batch_size": 2 + i},
            "seed": i,
            **tables,
        }
        for i in range(4)
    ]
    alone = [
        tuned(cut_config(design, tmp_path / f"alone-{i}", model, **config))["loss"] for i, config in enumerate(configs)
    ]
    together: list[list[float]] = [[] for _ in configs]
    with serving(cut_config(design, tmp_path / "provider", model, session=session, **tables)) as running:

        def owner(i: int) -> None:
            config = connected(
                design, tmp_path / f"owner-{i}", running, **({"model": model} if model else {}), **configs[i]
            )
            together[i] = own_here(config)["history"]["loss"]

        threads = [threading.Thread(target=owner, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        until(lambda: running.names().count("session_ended") == 4)
    return together, alone, running


@pytest.mark.parametrize(
    ("design", "options"),
    [
        pytest.param("split", {}, id="split"),
        pytest.param(
            "split",
            {"server": {"activations": "recompute"}},
            id="split recomputing",
            marks=[pytest.mark.slow, pytest.mark.ci],
        ),
        pytest.param("gradfree", {}, id="gradfree", marks=[pytest.mark.slow, pytest.mark.ci]),
    ],
)
def test_four_owners_at_once_have_the_losses_that_each_has_alone(
    design: str, options: dict[str, Any], tmp_path: Path
) -> None:
    together, alone, running = with_four_owners(design, tmp_path, **options)
    assert [len(losses) for losses in together] == [6, 7, 8, 9], "no step is lost"
    assert together == alone
    assert len({losses[0] for losses in alone}) == 4, "four different runs"
    assert running.names().count("refused") == 0


# --- a link that is lost ---------------------------------------------------------------------------------------------


class Flaky:
    """Links to one provider, the way an owner gets them; each breaks when it is told to."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.clients: list[Client] = []

    def __call__(self) -> Any:
        self.clients.append(Client(self.provider))
        agree(self.clients[-1])
        return self.clients[-1].link

    def lose(self) -> None:
        self.clients[-1].close()


def context(*, keep: bool = True, cache_id: int = 0, training: bool = True) -> Any:
    from veiltune.models.trunk_stub import TrunkContext

    return TrunkContext(None, None, cache_id, keep, keep, training)


@pytest.mark.parametrize(("family", "dropout"), [("llama", 0.0), ("gpt2", 0.4)])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_link_lost_between_forward_and_backward_changes_no_gradient(
    activations: str, family: str, dropout: float, tmp_path: Path
) -> None:
    """Two micro-batches pending. Where the trunk drops out, it drops the same again."""
    config = cut_config("split", tmp_path, deep_model(family, dropout), split={"server": {"activations": activations}})
    found = []
    for losing in (False, True):
        links = Flaky(provider_of(config))
        port = WirePort(links(), WireOptions(), links)
        first, output = port.forward(states(seed=1), context())
        second, _ = port.forward(states(seed=2), context())
        if losing:
            links.lose()
        gradients = [port.backward(second, states(seed=3)), port.backward(first, states(seed=4))]
        if losing:
            links.lose()
        again = port.forward(states(seed=5), context(training=False))[1]
        assert len(links.clients) == (3 if losing else 1)
        found.append([output, *gradients, again])
        links.lose()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_generation_that_loses_its_link_fails_and_says_so(provider: Provider) -> None:
    links = Flaky(provider)
    port = WirePort(links(), WireOptions(), links)
    port.forward(states(), context(keep=False, cache_id=1, training=False))
    links.lose()
    with pytest.raises(PeerLostError):
        port.forward(states(2, 1), context(keep=False, cache_id=1, training=False))
    assert len(links.clients) == 1, "its cache is gone with the session: nothing to reconnect for"
    port.forward(states(), context(keep=False, training=False))
    assert len(links.clients) == 2, "what comes after can"
    links.lose()


def test_without_a_way_back_a_lost_link_is_the_end(provider: Provider) -> None:
    links = Flaky(provider)
    port = WirePort(links(), WireOptions())
    ticket, _ = port.forward(states(), context())
    links.lose()
    with pytest.raises(PeerLostError):
        port.backward(ticket, states())
    with pytest.raises(PeerLostError):
        port.forget(0)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (TrunkOutput(7, EXACTLY.encode(states())), "answered 7 to 1"),
        (TrunkGradient(1, EXACTLY.encode(states())), "expected TrunkOutput from the provider, got TrunkGradient"),
        (TrunkOutput(1, EXACTLY.encode(states(1, 5))), r"answered \(1, 5, 32\) to \(2, 5, 32\)"),
        (TrunkOutput(1, EXACTLY.encode(states())[:-1]), "malformed activations"),
        (TrunkOutput(1, poked(EXACTLY.encode(states()), 24, NAN)), "not finite"),
        (Refused("ProtocolError", "not today", "come again"), "the provider refuses: not today"),
    ],
    ids=["ticket", "kind", "shape", "truncated", "NaN", "refused"],
)
def test_an_owner_does_not_take_any_answer(answer: Any, words: str) -> None:
    mine, theirs = memory_pair("owner", "provider")
    theirs.send(answer)
    with pytest.raises(ProtocolError, match=words) as caught:
        WirePort(mine, WireOptions()).forward(states(), context())
    if isinstance(answer, Refused):
        assert caught.value.hint == "come again"


def test_an_owners_own_states_must_be_finite(client: Client) -> None:
    port = WirePort(client.link, WireOptions())
    with pytest.raises(VeiltuneError, match="activations hold values that are not finite"):
        port.forward(states() * float("inf"), context())
    assert session_of(client).pending == {}


# --- a service that comes and goes -----------------------------------------------------------------------------------


@pytest.fixture
def undisturbed(tmp_path: Path) -> tuple[dict[str, Any], list[float]]:
    """Tables of a run, and its losses with a provider of its own."""
    tables = {
        "data": {"train": str(write_examples(tmp_path / "train.jsonl", 12))},
        "train": {**TRAIN, "accumulate": 2},
        "lora": {"init_seed": 1, "dropout": 0.2},
    }
    return tables, tuned(cut_config("split", tmp_path / "undisturbed", **tables))["loss"]


def breaking(running: Running, monkeypatch: pytest.MonkeyPatch, at: list[tuple[str, int]], *, back: bool) -> list[str]:
    """From now on the service goes down at these calls of the server's sessions, and comes back at once or not at all."""
    calls: dict[str, int] = {}
    done: list[str] = []

    def around(name: str) -> Callable[..., Any]:
        plain = getattr(TrunkSession, name)

        def run(self: Any, request: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            if (name, calls[name]) in at:
                done.append(name)
                running.stop()
                if back:
                    running.start()
                raise PeerLostError("this session has ended")
            return plain(self, request)

        return run

    for name in {name for name, _ in at}:
        monkeypatch.setattr(TrunkSession, name, around(name))
    return done


def test_a_server_that_vanishes_and_comes_back_costs_nothing(
    service: Running, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in a forward and once in a backward, in the middle of a step of two micro-batches."""
    tables, losses = undisturbed
    done = breaking(service, monkeypatch, [("_forward", 6), ("_backward", 14)], back=True)
    figures = own_here(connected("split", tmp_path / "owner", service, **tables))
    assert done == ["_forward", "_backward"]
    assert figures["history"]["loss"] == losses
    assert service.names().count("listening") == 3


def test_a_server_that_is_gone_for_good_leaves_a_checkpoint_to_go_on_from(
    service: Running, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, losses = undisturbed
    done = breaking(service, monkeypatch, [("_backward", 12)], back=False)
    config = connected("split", tmp_path / "owner", service, session={"retry_seconds": 0.5}, **tables)
    events: list[str] = []
    with pytest.raises(PeerLostError, match="the provider is not to be reached: nothing listens at") as caught:
        own_here(config, on_event=lambda name, _: events.append(name))
    assert done == ["_backward"]
    assert "veiltune party provider" in str(caught.value.hint)
    assert "--resume" in str(caught.value.hint)
    commit = json.loads((tmp_path / "owner" / COMMIT).read_text(encoding="utf-8"))
    assert commit["step"] == 5, "the last whole step of two micro-batches"
    assert commit["history"]["loss"] == losses[:5]
    assert "checkpoint" in events
    monkeypatch.undo()
    monkeypatch.setenv("VEILTUNE_CACHE", str(helpers.scratch() / "cache"))
    service.start()
    assert own_here(config, resume=True)["history"]["loss"] == losses


def test_a_provider_that_came_back_with_other_weights_is_refused(
    service: Running, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner remembers what it began with. In the middle of a run, and on resuming."""
    tables, _ = undisturbed
    name = service.config.model
    other = cut_config(
        "split", tmp_path / "provider", deep_model(seed=1), session={"token_file": str(tmp_path / "token")}
    )
    plain = Provider.terms
    monkeypatch.setattr(Provider, "terms", lambda self: {**plain(self), "model": name})  # called the same
    before = service.config
    done = breaking(service, monkeypatch, [("_forward", 8)], back=True)
    service.config = other
    config = connected("split", tmp_path / "owner", service, **tables)
    with pytest.raises(RefusedError, match=r"asks for weights = .*this provider serves") as caught:
        own_here(config)
    assert done
    assert "--overwrite" in str(caught.value.hint)
    assert before.model != other.model


def test_the_server_and_the_plan_are_what_the_tests_build_on(provider: Provider) -> None:
    assert isinstance(provider.server, TrunkServer)
    assert provider.plan == SplitPlan()
    assert list(provider.server.cut.trunk) == [1, 2, 3]
    assert CUT == {"bottom_layers": 1, "top_layers": 1}


def test_a_refused_owner_is_named_in_a_whole_session_too(tmp_path: Path) -> None:
    """Both parties of one session, with a model that has too few layers: the error is the configuration's, not the wire's."""
    config = cut_config("split", tmp_path / "run", cut={"bottom_layers": 3, "top_layers": 3})
    with pytest.raises(PartyFailure, match="leave no trunk") as caught:
        helpers.run(config, "provision")
    assert caught.value.kind == "ConfigError"


def test_addresses() -> None:
    assert parse_address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert parse_address("[::1]:80") == ("::1", 80)
    for text in ("localhost", ":80", "a:b", "a:70000"):
        with pytest.raises(VeiltuneError, match="is no address"):
            parse_address(text)
    assert socket.AF_INET6
