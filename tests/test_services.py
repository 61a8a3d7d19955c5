"""`veiltune party` and `veiltune tune` as programs of their own, over TCP: what an operator and an owner would type.

Each is a new interpreter, so these tests are slow.
"""

from __future__ import annotations

import json
import signal
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import helpers
from commands import outside, runner
from cutting import CUT, EXACT, cut_config, deep_model
from helpers import tuned, write_examples
from programs import Program, write_toml
from veiltune.session import service as service_module

STEPS = 8
pytestmark = [pytest.mark.slow, pytest.mark.ci]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEILTUNE_CACHE", str(helpers.scratch() / "cache"))


def values(directory: Path, design: str, **changes: Any) -> dict[str, Any]:
    """Dotted keys of a configuration; both sides begin with the same."""
    found: dict[str, Any] = {
        "design": design,
        "model": deep_model(),
        "output": str(directory / "out"),
        "device": "cpu",
        "data.max_length": 64,
        "lora.rank": 4,
        "lora.init_seed": 1,
        "train.steps": STEPS,
        "train.batch_size": 4,
        "train.learning_rate": 3e-3,
        "session.threads": 1,
    }
    found |= {f"cut.{name}": value for name, value in CUT.items()}
    flat = {f"{design}.{a}.{b}": each for a, table in EXACT[design].items() for b, each in table.items()}
    return {**found, **flat, **{name.replace("__", "."): value for name, value in changes.items()}}


@contextmanager
def started(directory: Path, design: str, **changes: Any) -> Generator[tuple[Program, str]]:
    """A provider and its address."""
    token = str(directory / "token")
    program = Program(
        write_toml(directory / "provider", values(directory / "provider", design, session__token_file=token, **changes))
    )
    try:
        yield program, program.wait_for("listening")["address"]
    finally:
        if program.process.poll() is None:
            program.end(signal.SIGKILL)


def owner_settings(directory: Path, name: str, design: str, address: str, **changes: Any) -> dict[str, Any]:
    """An owner's configuration, with data of its own."""
    own = directory / name
    own.mkdir(exist_ok=True)
    data = str(write_examples(own / "train.jsonl", 12, seed=len(name)))
    return {
        **values(own, design, data__train=data, session__token_file=str(directory / "token"), **changes),
        "session.connect.provider": address,
        "session.retry_seconds": 60,
    }


def losses_alone(directory: Path, design: str, settings: dict[str, Any]) -> list[float]:
    """The same run in threads of this process, with a provider of its own."""
    config = cut_config(
        design,
        directory,
        data={"train": settings["data.train"], "max_length": 64},
        train={"steps": settings["train.steps"], "batch_size": 4, "optimizer": "adamw", "learning_rate": 3e-3},
        seed=settings.get("seed", 0),
    )
    return tuned(config)["loss"]


def test_several_owners_tune_at_one_provider_and_each_has_its_own_losses(tmp_path: Path) -> None:
    """Four programs at once at a fifth. Then one of them asks the model it tuned, and the provider ends when it is told to."""
    with started(tmp_path, "split") as (program, address):
        token = tmp_path / "token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        names = ["a", "bb", "ccc", "dddd"]
        settings = [owner_settings(tmp_path, name, "split", address, seed=len(name)) for name in names]
        configs = [write_toml(tmp_path / name, each) for name, each in zip(names, settings, strict=True)]
        owners = [outside(["tune", config, "--json"]) for config in configs]
        ended = [owner.communicate(timeout=250) for owner in owners]
        for owner, (_, err) in zip(owners, ended, strict=True):
            assert owner.returncode == 0, err
        records = [json.loads(out) for out, _ in ended]
        expected = [losses_alone(tmp_path / f"alone-{i}", "split", each) for i, each in enumerate(settings)]
        assert [record["loss"] for record in records] == expected
        assert len({losses[0] for losses in expected}) == 4
        assert records[0]["cost"]["messages"]["owner->provider"]["TrunkBackward"] == STEPS
        assert (tmp_path / "a" / "out" / "adapter" / "adapter_model.safetensors").is_file()
        assert not (tmp_path / "a" / "out" / "parties" / "provider").exists(), "that is elsewhere"

        with outside(
            ["generate", configs[0], "--prompt", "The cat is red.", "--max-new-tokens", "4", "--json"]
        ) as asked:
            out, err = asked.communicate(timeout=100)
        assert asked.returncode == 0, err
        assert json.loads(out)["is_tuned"] is True
        assert 1 <= len(json.loads(out)["tokens"]) <= 4
        for _ in range(5):
            program.wait_for("session_ended")
        assert program.end() == 0
    assert not {"refused", "turned_away", "owner_gone"} & {event["event"] for event in program.events}
    assert token.read_text().strip() not in json.dumps([*program.events, *records])


def test_a_provider_killed_in_the_middle_is_waited_for(tmp_path: Path) -> None:
    """SIGKILL while an owner tunes, and the same address again: the losses are those of an undisturbed run."""
    with started(tmp_path, "online") as (program, address):
        settings = owner_settings(tmp_path, "owner", "online", address, train__steps=150)
        config = write_toml(tmp_path / "owner", settings)
        with outside(["tune", config, "--json"]) as owner:
            transcript = tmp_path / "owner" / "out" / "config.json"
            deadline = time.monotonic() + 100
            while not transcript.exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert owner.stderr is not None
            for line in owner.stderr:
                if "tuning" in line and "/150" in line:
                    break
            assert program.end(signal.SIGKILL) == -signal.SIGKILL
            again = Program(str(tmp_path / "provider" / "run.toml"), listen=address)
            try:
                again.wait_for("listening")
                out, err = owner.communicate(timeout=250)
                assert owner.returncode == 0, err
                again.wait_for("session_ended")
                assert again.end(signal.SIGINT) == 0
            finally:
                if again.process.poll() is None:
                    again.end(signal.SIGKILL)
        assert json.loads(out)["loss"] == losses_alone(tmp_path / "alone", "online", settings)


def test_an_owner_with_another_token_is_turned_away(tmp_path: Path) -> None:
    with started(tmp_path, "gradfree") as (program, address):
        settings = owner_settings(tmp_path, "stranger", "gradfree", address)
        other = tmp_path / "other-token"
        service_module.read_token(other, create=True)
        config = write_toml(tmp_path / "stranger", {**settings, "session.token_file": str(other)})
        with outside(["tune", config]) as owner:
            _, err = owner.communicate(timeout=100)
        assert owner.returncode == 3, err
        assert "did not prove that it belongs to this session" in err
        assert "Traceback" not in err
        assert program.wait_for("turned_away")["why"] == "it does not hold this session's token"
        assert program.end() == 0


def test_offsite_over_tcp_leaves_the_result_with_the_provider(tmp_path: Path) -> None:
    with started(tmp_path, "offsite") as (program, address):
        config = write_toml(tmp_path / "owner", owner_settings(tmp_path, "owner", "offsite", address))
        with outside(["tune", config, "--json"]) as owner:
            out, err = owner.communicate(timeout=200)
        assert owner.returncode == 0, err
        assert "TrunkForward" not in json.loads(out)["cost"]["messages"]["owner->provider"]
        assert program.end() == 0
    (merged,) = (tmp_path / "provider" / "out" / "parties" / "provider").glob("plug-in-*-s1")
    assert load_file(next(iter(sorted(merged.glob("*.safetensors")))))


# --- what is refused before anything is started: quick, in this process ---------------------------------------------------


@pytest.fixture
def veiltune(capsys: pytest.CaptureFixture[str]) -> Any:
    return runner(capsys)


@pytest.mark.parametrize(
    ("verb", "changes", "error", "hint"),
    [
        ("party provider", {}, "session.token_file is not set", "name the file"),
        ("party provider", {"session.token_file": "EMPTY"}, "holds no session token", "copy it again"),
        (
            "party owner",
            {},
            "session.connect names no services, and under split no 'owner' runs as a service",
            "(provider)",
        ),
        ("party host", {"session.token_file": "NEW"}, "split has no 'host' that runs as a service", "provider"),
        ("party provider", {"session.token_file": "NEW", "design": "local"}, "local has no 'provider'", "none"),
        ("tune", {"session.connect.provider": "127.0.0.1:1"}, "session.token_file is not set", "name the file"),
        (
            "tune",
            {"session.connect.provider": "127.0.0.1:1", "session.token_file": "NEW"},
            "no token file",
            "copy it from the service",
        ),
        ("tune", {"session.connect.provider": "nowhere"}, "'nowhere' is no address", "HOST:PORT"),
        ("tune", {"session.connect.host": "127.0.0.1:1"}, "split has no 'host' that runs as a service", "provider"),
        (
            "tune",
            {"session.connect.provider": "127.0.0.1:1", "session.processes": False},
            "session.connect needs session.processes",
            "leave",
        ),
        (
            "tune",
            {"session.connect.provider": "127.0.0.1:1", "session.record": ["provider"]},
            "session.record = ['provider']: with session.connect the provider is a service, which records no transcript",
            "leave session.connect out",
        ),
        (
            "party provider",
            {"session.token_file": "NEW", "session.record": ["provider"]},
            "session.record = ['provider']: a service records no transcript",
            "started by tune",
        ),
    ],
)
def test_what_cannot_be_a_service(
    veiltune: Any, tmp_path: Path, verb: str, changes: dict[str, Any], error: str, hint: str
) -> None:
    (tmp_path / "EMPTY").write_text("nothing\n", encoding="utf-8")
    settings = values(tmp_path, "split", data__train=str(write_examples(tmp_path / "train.jsonl", 4)))
    changes = {
        name: str(tmp_path / value) if name == "session.token_file" else value for name, value in changes.items()
    }
    ran = veiltune(*verb.split(), write_toml(tmp_path, {**settings, **changes}))
    assert ran.code == 2, ran.err
    assert f"error: {error}" in ran.err or error in ran.err.split("error: ")[1].splitlines()[0]
    assert hint in ran.err.split("hint: ")[1].splitlines()[0]
    assert "Traceback" not in ran.err


def test_a_port_that_is_taken(veiltune: Any, tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = write_toml(tmp_path, values(tmp_path, "split", session__token_file=str(tmp_path / "token")))
        ran = veiltune("party", "provider", config, "--listen", address)
    assert ran.code == 2
    assert f"cannot listen at {address}" in ran.err
    assert "another --listen" in ran.err


def test_interpreters_are_few() -> None:
    """A guard for whoever adds tests here: each program takes seconds."""
    assert Path(__file__).read_text(encoding="utf-8").count("outside(") <= 7
