"""Provider, enclave and host as services on their own, under designs with an enclave: programs on loopback, with keys.

What an owner gets from services is what it gets from processes of its own, bit for bit; what is not agreed on is refused; a
party that is killed or stopped costs nothing that was committed.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import helpers
from commands import outside
from helpers import make_config, model_directory, tuned, write_examples
from programs import Program, write_toml
from veiltune.config import load_config
from veiltune.designs import option_tables
from veiltune.session.live import live_owner
from veiltune.transport.identity import make_identity, private_file
from veiltune.transport.shared_memory import ARENA_NAME

ROLES = ("owner", "provider", "enclave", "host")
SERVICES = ("host", "enclave", "provider")
"""In the order in which they are started: whoever is dialled comes first."""
DIALS = {"owner": ("provider", "enclave"), "provider": ("enclave",), "enclave": ("host",), "host": ()}
STEPS = 6
pytestmark = pytest.mark.slow  # each starts four programs or more; the automatic checks run one of a kind


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEILTUNE_CACHE", str(helpers.scratch() / "cache"))


class Organisations:
    """Keys, configurations and services of four parties, each with a directory of its own."""

    def __init__(self, directory: Path, design: str, *, keys: bool = True, **changes: Any) -> None:
        self.directory = directory
        self.keys = keys
        self.design = design
        self.changes = {name.replace("__", "."): value for name, value in changes.items()}
        self.pins = {role: make_identity(directory / role, role).pin for role in ROLES}
        self.addresses: dict[str, str] = {}
        self.programs: dict[str, Program] = {}
        self.environments: dict[str, dict[str, str]] = {}
        """What a role's program has besides."""

    def settings(self, role: str, name: str | None = None, **changes: Any) -> dict[str, Any]:
        """One party's configuration."""
        own = self.directory / (name or role)
        return {
            "design": self.design,
            "model": model_directory("llama"),
            "output": str(own / "out"),
            "device": "cpu",
            "lora.rank": 4,
            "lora.init_seed": 1,
            "train.optimizer": "adamw",
            "enclave.allow_simulated": True,
            f"{self.design}.key_seed": 5,
            "session.threads": 1,
            "session.retry_seconds": 40,
            **self.guards(role),
            **{f"session.connect.{peer}": self.addresses[peer] for peer in DIALS[role]},
            **self.changes,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }

    def guards(self, role: str) -> dict[str, Any]:
        """A key and everybody's pins, or the token alone."""
        if not self.keys:
            return {"session.token_file": str(self.directory / "token")}
        peers = [{"role": each, "key": pin} for each, pin in self.pins.items()]
        return {"identity.key": str(private_file(self.directory / role, role)), "peers": peers}

    def start(self, role: str, *, listen: str = "127.0.0.1:0", more: tuple[str, ...] = ()) -> Program:
        """A service, at its old address if it had one."""
        config = write_toml(self.directory / role, self.settings(role))
        address, more_of = self.addresses.get(role, listen), self.environments.get(role)
        program = self.programs[role] = Program(config, role, listen=address, more=more, environment=more_of)
        self.addresses[role] = program.ready()
        return program

    def owner(self, name: str = "owner", **changes: Any) -> str:
        """An owner's configuration file, with a text of its own."""
        own = self.directory / name
        own.mkdir(exist_ok=True)
        text = {"data.train": str(write_examples(own / "train.jsonl", 12, seed=len(name))), "data.max_length": 64}
        train = {"train.steps": STEPS, "train.batch_size": 4, "train.learning_rate": 1e-2}
        return write_toml(
            own,
            {**self.settings("owner", name), **text, **train, **{k.replace("__", "."): v for k, v in changes.items()}},
        )

    def expected(self, name: str = "owner", **changes: Any) -> list[float]:
        """The losses of the same run with every party in this process."""
        train = {"optimizer": "adamw", "steps": STEPS, "batch_size": 4, "learning_rate": 1e-2}
        train |= {key.removeprefix("train__"): value for key, value in changes.items() if key.startswith("train__")}
        more = {key: value for key, value in changes.items() if "__" not in key}
        data = {"train": str(self.directory / name / "train.jsonl"), "max_length": 64}
        options = {self.design: {"key_seed": 5}}
        output = self.directory / f"{name}-here"
        return tuned(make_config(self.design, "llama", output, train=train, data=data, **options, **more))["loss"]


@contextmanager
def organisations(
    directory: Path,
    design: str,
    *,
    keys: bool = True,
    environments: dict[str, dict[str, str]] | None = None,
    **changes: Any,
) -> Generator[Organisations]:
    """All services of a design, up."""
    made = Organisations(directory, design, keys=keys, **changes)
    made.environments |= environments or {}
    try:
        for role in SERVICES:
            made.start(role, more=("--health", "127.0.0.1:0") if role == "enclave" else ())
        yield made
    finally:
        for program in made.programs.values():
            if program.process.poll() is None:
                program.end(signal.SIGKILL)


def ran(arguments: list[str], seconds: float = 200.0) -> tuple[int, str, str]:
    """A command to its end."""
    with outside(arguments) as process:
        out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def get(address: str, path: str) -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
        return answer.read().decode()


@pytest.mark.ci
def test_owners_one_after_another_at_the_same_services(tmp_path: Path) -> None:
    """Two owners with other texts and seeds; one asks the model it tuned; what differs in what is agreed on is refused."""
    with organisations(tmp_path, "obfuscatune") as made:
        first, second = made.owner(), made.owner("another", seed=7, train__steps=4)
        code, out, err = ran(["tune", first, "--json"])
        assert code == 0, err
        record = json.loads(out)
        assert record["loss"] == made.expected()
        assert record["simulated_enclave"] is True
        assert record["cost"]["messages"]["owner->enclave"]["OpenSession"] == 1
        assert (tmp_path / "owner" / "out" / "adapter" / "adapter_model.safetensors").is_file()
        assert [path.name for path in (tmp_path / "owner" / "out" / "parties").iterdir()] == ["owner"]

        code, out, err = ran(["party", "owner", second, "--json"])
        assert code == 0, err
        assert json.loads(out)["loss"] == made.expected("another", seed=7, train__steps=4)

        code, out, err = ran(["generate", first, "--prompt", "The cat is red.", "--max-new-tokens", "4", "--json"])
        assert code == 0, err
        assert json.loads(out)["is_tuned"] is True

        code, out, err = ran(["tune", made.owner("differs", lora__rank=8)])
        assert code == 3, err
        assert "has another configuration" in err
        assert (
            made.programs["provider"].wait_for("turned_away")["why"].startswith("the owner has another configuration")
        )

        health = made.programs["enclave"].events[0]["health"]
        assert get(health, "/healthz") == "ok\n"
        assert get(health, "/readyz") == "ready\n"
        metrics = get(health, "/metrics")
        assert f"veiltune_steps_total {STEPS + 4}\n" in metrics
        assert "veiltune_session_ended_total 3\n" in metrics
        assert "veiltune_links_open 0\n" in metrics
        crossed = re.search(r'bytes_total\{sender="owner",receiver="enclave",kind="TrainBatch"\} (\d+)', metrics)
        assert crossed is not None
        assert int(crossed.group(1)) > 0
        states = list((tmp_path / "enclave" / "out" / "parties" / "enclave").iterdir())
        assert len(states) == 2, "a folder a run; what was asked or refused leaves none"
        for role in ("provider", "enclave", "host"):
            assert made.programs[role].end() == 0
            assert not {"refused", "owner_gone"} & made.programs[role].names()
            key = private_file(tmp_path / role, role).read_text().splitlines()[1]
            assert key not in json.dumps(made.programs[role].events) + made.programs[role].errors + metrics


@pytest.mark.parametrize("link", ["shared_memory", "tcp"])
def test_enclave_and_host_share_memory_where_both_say_so(tmp_path: Path, link: str) -> None:
    """And the losses are the same. What an enclave has mapped tells; nobody else maps an arena."""
    with organisations(tmp_path, "veil", session__link=link) as made:
        config = load_config(Path(made.owner()), options=option_tables())
        with live_owner(config):
            maps = {role: Path(f"/proc/{each.process.pid}/maps").read_text() for role, each in made.programs.items()}
        mapped = {role for role, text in maps.items() if ARENA_NAME in text}
        assert mapped == ({"enclave", "host"} if link == "shared_memory" else set())
        code, out, err = ran(["tune", made.owner("tunes"), "--json"])
        assert code == 0, err
        assert json.loads(out)["loss"] == made.expected("tunes")


def test_an_owner_is_told_what_the_provider_lacks(tmp_path: Path) -> None:
    """By whoever it hears of it first: the enclave says why the provider left, not only that it did."""
    model = tmp_path / "model"
    shutil.copytree(model_directory("llama"), model)
    with organisations(tmp_path, "veil", model=str(model)) as made:
        shutil.rmtree(model)
        code, _, err = ran(["tune", made.owner()])
        why = made.programs["provider"].wait_for("refused")["why"]
        assert "model" in why
        assert code != 0
        assert why in err
        assert "closed its link" not in err


def test_dropout_draws_what_it_draws_among_local_processes(tmp_path: Path) -> None:
    """The host's generator is seeded by the owner's seed, which is no part of what the host's own configuration says."""
    with organisations(tmp_path, "obfuscatune", lora__dropout=0.2) as made:
        there = made.owner("there", seed=7)
        alone = {key: value for key, value in made.settings("owner", "there").items() if "connect" not in key}
        text = {key: json.loads(value) for key, value in toml_lines(there) if key.startswith(("data.", "train."))}
        here = write_toml(tmp_path / "here", {**alone, **text, "seed": 7, "output": str(tmp_path / "here" / "out")})
        losses = []
        for config in (there, here):
            code, out, err = ran(["tune", config, "--json"])
            assert code == 0, err
            losses.append(json.loads(out)["loss"])
    assert losses[0] == losses[1]


def toml_lines(path: str) -> list[tuple[str, str]]:
    """Keys and values of a flat file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [(key, value) for key, sep, value in (line.partition(" = ") for line in lines) if sep]


def test_verify_through_services_and_a_token(tmp_path: Path) -> None:
    """Without keys, on one machine: the enclave tells owner and provider apart by the names that they prove."""
    with organisations(tmp_path, "obfuscatune", keys=False, lora__rank=8, train__optimizer="sgd") as made:
        chosen = {"session.token_file": str(tmp_path / "token"), "obfuscatune.key_seed": 5, "session.threads": 1}
        chosen |= {f"session.connect.{role}": made.addresses[role] for role in DIALS["owner"]}
        flags = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
        code, out, err = ran(["verify", model_directory("llama"), "--processes", "--json", *flags])
        assert code == 0, err
        assert json.loads(out)["is_within"] is True
        made.programs["host"].wait_for("session_ended")
        token = (tmp_path / "token").read_text().strip()
        assert token not in json.dumps(made.programs["enclave"].events) + made.programs["enclave"].errors


@pytest.mark.parametrize(
    ("design", "victim"),
    [pytest.param("veil", "host", marks=pytest.mark.ci), ("obfuscatune", "enclave"), ("veil", "provider")],
)
def test_a_party_killed_in_the_middle_and_started_again(design: str, victim: str, tmp_path: Path) -> None:
    """The run goes on from its last checkpoint with the losses that it would have had; a dead provider is not missed."""
    with organisations(tmp_path, design) as made:
        changes = {"train__steps": 60, "train__checkpoint_every": 2}
        config = made.owner(**changes)
        commit = tmp_path / "owner" / "out" / "checkpoint.json"
        with outside(["tune", config, "--json"]) as owner:
            deadline = time.monotonic() + 100
            while not commit.exists():
                assert time.monotonic() < deadline
                assert owner.poll() is None, owner.stderr.read() if owner.stderr else ""
                time.sleep(0.02)
            assert made.programs[victim].end(signal.SIGKILL) == -signal.SIGKILL
            out, err = owner.communicate(timeout=100)
        if victim != "provider":
            assert owner.returncode == 4, err
            assert f"the {victim} closed its link" in err
            assert "Traceback" not in err
            assert 2 <= json.loads(commit.read_text())["step"] < 60
            made.start(victim)
            code, out, err = ran(["tune", config, "--json", "--resume"])
            assert code == 0, err
        assert json.loads(out)["loss"] == made.expected(**changes)


@pytest.mark.parametrize("stopped", ["host", "enclave"])
def test_a_party_that_is_told_to_stop_lets_the_run_save(stopped: str, tmp_path: Path) -> None:
    with organisations(tmp_path, "obfuscatune") as made:
        changes = {"train__steps": 60}
        config = made.owner(**changes)
        with outside(["tune", config, "--json"]) as owner:
            made.programs["enclave"].wait_for("border")
            assert made.programs[stopped].end(signal.SIGTERM) == 0
            out, err = owner.communicate(timeout=100)
        assert owner.returncode == 130, err
        assert 0 < json.loads(out)["step"] < 60
        assert "resume with" in err
        made.start(stopped)
        code, out, err = ran(["tune", config, "--json", "--resume"])
        assert code == 0, err
        assert json.loads(out)["loss"] == made.expected(**changes)
