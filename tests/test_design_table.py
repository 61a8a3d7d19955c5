"""The table of designs without running one: that it is coherent, that every link holds to it, that a new line is enough."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from veiltune.config import Config, Section, load_config
from veiltune.designs import DESIGNS, Design, option_tables
from veiltune.designs.base import (
    ENGINE_REVEALS,
    OWNER_REVEALS,
    PROVIDER_REVEALS,
    SPLIT_OWNER_REVEALS,
    SPLIT_PROVIDER_REVEALS,
    Reveal,
)
from veiltune.errors import ConfigError, DataError, ProtocolError
from veiltune.parties.owner import Owner
from veiltune.parties.party import Job, Party
from veiltune.session.launch import CONTROL, channel_options, start_threads
from veiltune.transport.channel import memory_pair
from veiltune.transport.messages import (
    MESSAGES,
    CostReport,
    CostRequest,
    Goodbye,
    LogitsRequest,
    Message,
    PartyDone,
    PartyFailed,
    Progress,
)

designs = pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
CUTTING = [DESIGNS[name] for name in ("split", "online", "gradfree", "offsite", "offline")]
"""The designs that cut the model: the owner trains, and the provider runs the trunk."""
LINKS = [(design, *link) for design in DESIGNS.values() for link in design.links]
links = pytest.mark.parametrize(("design", "a", "b"), LINKS, ids=[f"{d.name}-{a}-{b}" for d, a, b in LINKS])


# --- the table --------------------------------------------------------------------------------------------------------


@designs
def test_links_join_roles_and_every_end_has_a_table(design: Design) -> None:
    for a, b in design.links:
        assert a in design.roles
        assert b in design.roles
        assert a != b
        assert a in design.reveals
        assert b in design.reveals
    pairs = [frozenset(link) for link in design.links]
    assert len(pairs) == len(set(pairs)), "two parties have one link"
    assert design.data_plane in design.links


@designs
def test_trainer_and_enclaves_are_roles_and_the_owner_reaches_the_trainer(design: Design) -> None:
    assert design.trainer in design.roles
    assert design.enclaves <= design.roles.keys()
    linked = {frozenset(link) for link in design.links}
    for role in {"owner", "provider"} - {design.trainer}:
        assert {role, design.trainer} in linked
    assert (design.trainer == "owner") == (design in CUTTING)
    assert not {"owner", "provider", "host"} & design.enclaves
    assert design.also_sees.keys() <= design.roles.keys()


@designs
def test_nobody_gets_what_only_the_supervisor_may(design: Design) -> None:
    private = {"Progress", "PartyDone", "PartyFailed", "Interrupt"}
    assert not any(private & table.keys() for table in design.reveals.values())


TEXT = {"TrainBatch", "EvalBatch", "ScoreBatch", "LogitsRequest", "GenerateRequest"}
"""Messages that hold the owner's text: where the owner trains, there is nobody to send them to."""


@designs
def test_only_the_trainers_table_lists_text_and_plain_weights(design: Design) -> None:
    for observer, table in design.reveals.items():
        listed = table.keys() & {*TEXT, "WeightShard"}
        if observer != design.trainer:
            assert not listed, observer
        else:
            assert listed == ({"WeightShard"} if observer == "owner" else {*TEXT, "WeightShard"})


@designs
def test_common_tables_are_part_of_every_designs(design: Design) -> None:
    if design in CUTTING:
        assert design.reveals["owner"].items() >= SPLIT_OWNER_REVEALS.items()
        assert design.reveals["provider"].items() >= SPLIT_PROVIDER_REVEALS.items()
    else:
        assert design.reveals["owner"].items() >= OWNER_REVEALS.items()
        assert design.reveals["provider"].items() >= PROVIDER_REVEALS.items()
        assert design.reveals[design.trainer].items() >= ENGINE_REVEALS.items()


def test_what_each_design_that_cuts_adds_to_the_common_tables() -> None:
    """Gradients where the bottom is trained through the trunk, emulator and result where it is not; nothing for gradfree."""
    added = {
        design.name: (
            design.reveals["owner"].keys() - SPLIT_OWNER_REVEALS.keys(),
            design.reveals["provider"].keys() - SPLIT_PROVIDER_REVEALS.keys(),
        )
        for design in CUTTING
    }
    gradients = ({"TrunkGradient"}, {"TrunkBackward"})
    emulator = ({"EmulatorShard"}, {"EmulatorRequest", "PlugIn"})
    assert added == {
        "split": gradients,
        "online": gradients,
        "gradfree": (set(), set()),
        "offsite": emulator,
        "offline": emulator,
    }


@designs
def test_the_baseline_is_a_table_of_locals(design: Design) -> None:
    DESIGNS["local"].options.model_validate(dict(design.baseline))
    assert bool(design.baseline) == (design in CUTTING)
    assert "lora" in design.methods
    assert design.services.keys() <= design.roles.keys()


@designs
def test_options_are_a_section_with_defaults_and_refuse_unknown_keys(design: Design) -> None:
    assert issubclass(design.options, Section)
    assert design.is_exact(design.options()) is (design.name in {"local", "obfuscatune", "split", "veil"})
    with pytest.raises(ValueError, match="Extra inputs"):
        design.options.model_validate({"no_such_option": 1})


WIRE = {"activation_bits": 32, "gradient_bits": 32}


@pytest.mark.parametrize(
    ("name", "options", "exact"),
    [
        ("online", {"wire": WIRE, "decorrelation": {"alpha": 0}}, True),
        ("online", {"wire": WIRE}, False),
        ("online", {"wire": {**WIRE, "gradient_bits": 16}, "decorrelation": {"alpha": 0}}, False),
        ("online", {"wire": WIRE, "decorrelation": {"alpha": 0}, "last_positions": 9}, False),
        ("online", {"wire": {**WIRE, "activation_bits": 16}, "decorrelation": {"alpha": 0}}, False),
        ("gradfree", {"wire": {"activation_bits": 32}}, True),
        ("gradfree", {"wire": {"activation_bits": 32}, "warm_up": {"steps": 1}}, False),
        ("gradfree", {"wire": {"activation_bits": 32}, "last_positions": 9}, False),
        ("offsite", {}, False),
        ("offline", {"wire": WIRE, "decorrelation": {"alpha": 0}}, False),
    ],
)
def test_exactness_is_claimed_where_nothing_is_rounded_or_added(name: str, options: Any, exact: bool) -> None:
    assert DESIGNS[name].is_exact(DESIGNS[name].options.model_validate(options)) is exact


# --- channels hold to it ----------------------------------------------------------------------------------------------


def value_of(hint: Any) -> Any:
    """Some value of a message's field, by its annotation."""
    origin = typing.get_origin(hint)
    if origin in {typing.Union, types.UnionType}:
        return None
    if origin is tuple:
        return (value_of(typing.get_args(hint)[0]),)
    if origin is dict:
        return {"a": value_of(typing.get_args(hint)[1])} if typing.get_args(hint)[1] is Tensor else {"a": 1}
    return {int: 1, float: 0.5, bool: True, str: "a", bytes: b"a", Tensor: torch.ones(2)}[hint]


def sample(kind: type[Message]) -> Message:
    hints = typing.get_type_hints(kind)
    return kind(**{field.name: value_of(hints[field.name]) for field in dataclasses.fields(kind)})


@pytest.mark.parametrize("kind", MESSAGES.values(), ids=MESSAGES)
def test_an_open_link_carries_every_message(kind: type[Message]) -> None:
    """The control of the two tests below: what is refused there is refused for its kind alone."""
    left, right = memory_pair("a", "b")
    left.send(sample(kind))
    assert type(right.recv(timeout=1)) is kind


@links
def test_a_sender_sends_what_its_peers_table_lists_and_nothing_else(design: Design, a: str, b: str) -> None:
    for me, peer in ((a, b), (b, a)):
        mine, theirs = memory_pair(me, peer, a_options=channel_options(design, me, peer, ()))
        for name, kind in MESSAGES.items():
            if name in design.reveals[peer]:
                mine.send(sample(kind))
                assert type(theirs.recv(timeout=1)) is kind
            else:
                with pytest.raises(ProtocolError, match=f"the {me} may not send {name} to the {peer}"):
                    mine.send(sample(kind))
                assert not theirs.poll(), "nothing has left"


@links
def test_a_receiver_refuses_what_its_own_table_lacks_whatever_the_sender_thinks(design: Design, a: str, b: str) -> None:
    for me, peer in ((a, b), (b, a)):
        for name, kind in MESSAGES.items():
            mine, theirs = memory_pair(me, peer, a_options=channel_options(design, me, peer, ()))
            theirs.send(sample(kind))
            if name in design.reveals[me]:
                assert type(mine.recv(timeout=1)) is kind
            else:
                with pytest.raises(ProtocolError, match=f"from the {peer}: the {me} may not receive {name}"):
                    mine.recv(timeout=1)


# --- a new design -----------------------------------------------------------------------------------------------------


class EchoOptions(Section):
    """Options of the design below."""

    times: int = 2


def ask(party: Party) -> None:
    """Ask as often as the options say, and count the answers."""
    answers = 0
    for _ in range(typing.cast("EchoOptions", party.options).times):
        party.links["echo"].send(CostRequest())
        answers += party.links["echo"].recv_as(CostReport).figures["one"]
    party.links["echo"].send(Goodbye())
    party.figures["answers"] = answers
    party.report("counted", {"answers": answers})


def echo(party: Party) -> None:
    """Answer until the other is done."""
    while not isinstance(party.links["owner"].recv(), Goodbye):
        party.links["owner"].send(CostReport({"one": 1}))


def _exact(_: BaseModel) -> bool:
    return True


def _never_owned(_: Party) -> Owner:
    raise AssertionError("nobody here is asked to be an owner")


ECHO = Design(
    name="echo",
    summary="for this test",
    options=EchoOptions,
    join=_never_owned,
    roles={"owner": ask, "echo": echo},
    links=(("owner", "echo"),),
    data_plane=("owner", "echo"),
    trainer="echo",
    enclaves=frozenset(),
    reveals={
        "owner": {"CostReport": Reveal("a one", "public")},
        "echo": {"CostRequest": Reveal("that one is asked for", "control"), "Goodbye": Reveal("the end", "control")},
    },
    also_sees={},
    exactness="none is needed",
    is_exact=_exact,
)


def started(design: Design, output: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> dict[str, list[Message]]:
    """Everything each party told the supervisor, to its end."""
    monkeypatch.setitem(DESIGNS, design.name, design)
    raw = {"design": design.name, "model": "none", "output": str(output), **values}
    config: Config = load_config(raw, options=option_tables())
    told: dict[str, list[Message]] = {}
    parties = start_threads(config, Job(verb="provision"))
    for running in parties:
        assert running.control.peer == running.role
        assert running.control.me == CONTROL
        told[running.role] = [running.control.recv(timeout=10)]
        while isinstance(told[running.role][-1], Progress):
            told[running.role].append(running.control.recv(timeout=10))
    for running in parties:
        running.stop(grace_seconds=10)
        assert running.thread is not None
        assert not running.thread.is_alive()
    return told


@pytest.mark.parametrize("times", [None, 0, 3])
def test_a_new_line_in_the_table_makes_a_session(
    times: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {} if times is None else {"echo": {"times": times}}
    expected = 2 if times is None else times
    told = started(ECHO, tmp_path / "run", monkeypatch, **tables)
    report, end = told["owner"]
    assert report == Progress("counted", {"role": "owner", "answers": expected})
    assert isinstance(end, PartyDone)
    assert end.fields["answers"] == expected
    traffic = end.fields["traffic"]
    assert traffic["owner->echo"].get("CostRequest", {}).get("messages", 0) == expected
    assert traffic["owner->echo"]["Goodbye"]["messages"] == 1
    (echoed,) = told["echo"]
    assert isinstance(echoed, PartyDone)
    assert (tmp_path / "run" / "parties" / "owner").is_dir()
    assert (tmp_path / "run" / "parties" / "echo").is_dir()


def test_its_options_are_checked_as_any_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'echo\.tims'") as caught:
        started(ECHO, tmp_path, monkeypatch, echo={"tims": 3})
    assert "'times'" in str(caught.value.hint)


def changed(role: str, run: Callable[[Party], None]) -> Design:
    return dataclasses.replace(ECHO, roles={**ECHO.roles, role: run})


def test_a_party_that_sends_what_is_not_listed_fails_and_its_peer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leak(party: Party) -> None:
        party.links["echo"].send(LogitsRequest(torch.ones(1, 1), torch.ones(1, 1)))

    told = started(changed("owner", leak), tmp_path, monkeypatch)
    (end,) = told["owner"]
    assert isinstance(end, PartyFailed)
    assert (end.error, end.exit_code) == ("ProtocolError", ProtocolError.exit_code)
    assert end.message == "the owner may not send LogitsRequest to the echo"
    (peers_end,) = told["echo"]
    assert isinstance(peers_end, PartyFailed)
    assert peers_end.error == "PeerLostError"


def test_a_deliberate_error_is_told_whole_and_a_foreign_one_by_its_type_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deliberate(_: Party) -> None:
        raise DataError("line 3 is empty", hint="remove it")

    def foreign(_: Party) -> None:
        raise KeyError("the text of the owner")

    (end,) = started(changed("owner", deliberate), tmp_path / "a", monkeypatch)["owner"]
    assert end == PartyFailed("DataError", "line 3 is empty", "remove it", DataError.exit_code)
    (end,) = started(changed("owner", foreign), tmp_path / "b", monkeypatch)["owner"]
    assert isinstance(end, PartyFailed)
    assert end.error == "InternalError"
    assert "KeyError" in end.message
    assert "text of the owner" not in f"{end.message} {end.hint}"
