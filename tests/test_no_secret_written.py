"""All parties as services, nothing recorded: no key, no text and no weight is in anything that a run writes or shows.

Looked through: what the programs print, metrics, logs, state and output directories, titles and environments of the processes.
The same search finds every one of these secrets where it was put on purpose.
"""

from __future__ import annotations

import base64
import json
import time
import urllib.request
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from safetensors.torch import load_file

from benchmarks._parties import COMMON, Parties, Program, polling, tuning
from helpers import model_directory, plain_model
from test_secrecy import encodings, holds, weight_bytes
from veiltune.secrets import MasterSecret
from veiltune.tee.sealing import SIMULATED_KEY_FILE
from veiltune.transport.identity import private_file

pytestmark = [pytest.mark.slow, pytest.mark.ci]
KEY_SEED = 5
HEALTH = ("--health", "127.0.0.1:0")
MODEL = "llama-tied-biased"


def forms(secret: bytes) -> Iterator[bytes]:
    """A secret as it might be written: as it is, in hexadecimal of either case, in base64 at each alignment."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    for shift in range(3):  # what stands before it moves it; the first and last characters depend on neighbours
        yield base64.b64encode(bytes(shift) + secret)[4:-4]
        yield base64.urlsafe_b64encode(bytes(shift) + secret)[4:-4]


def identity_needles(path: Path) -> Iterator[bytes]:
    """A private key: its number, and the lines of its file."""
    text = path.read_bytes()
    key: Any = serialization.load_pem_private_key(text, password=None)
    yield from forms(key.private_numbers().private_value.to_bytes(32, "big"))
    pem = text.split(b"-----END PRIVATE KEY")[0]
    yield from (line for line in pem.splitlines()[1:] if len(line) >= 16)


@dataclass
class Written:
    """What a run left and showed, by where it was; and the secrets that are not to be in it, by what they are."""

    places: dict[str, bytes]
    secrets: dict[str, list[bytes]]

    def leaks(self, *, where: str = "") -> set[tuple[str, str]]:
        """(place, secret) of whatever is found."""
        return {
            (place, name)
            for place, data in self.places.items()
            if place.startswith(where)
            for name, needles in self.secrets.items()
            if holds(data.ljust(16, b"\0"), needles)
        }


def processes(programs: Iterable[Program]) -> Iterator[tuple[str, bytes]]:
    """Titles and environments of programs and of the parties that they started."""
    for program in programs:
        for pid in program.pids():
            for name in ("cmdline", "environ", "comm"):
                try:
                    yield f"process {pid} {name}", Path(f"/proc/{pid}/{name}").read_bytes()
                except OSError:
                    continue


def files(made: Parties) -> Iterator[tuple[str, bytes]]:
    """Everything that the parties wrote, but for the secrets' own files and the text, which were there before or are that."""
    given = {private_file(made.directory / role, role) for role in made.roles}
    given.add(made.directory / "owner" / "train.jsonl")
    for path in made.directory.rglob("*"):
        if path.is_file() and path not in given and path.name != SIMULATED_KEY_FILE:
            yield str(path.relative_to(made.directory)), path.read_bytes()


def metrics(made: Parties) -> Iterator[tuple[str, bytes]]:
    for role in made.services:
        address = made.running[role].events("listening")[0]["health"]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            yield f"metrics of the {role}", answer.read()


def secrets_of(made: Parties, text: Path) -> dict[str, list[bytes]]:
    keys = {
        f"the {role}'s key": list(identity_needles(private_file(made.directory / role, role))) for role in made.roles
    }
    (sealing,) = made.state("enclave").rglob(SIMULATED_KEY_FILE)
    rows = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]
    return {
        **keys,
        "the master secret": list(forms(MasterSecret.for_tests(KEY_SEED).reveal())),
        "the sealing key": list(forms(sealing.read_bytes())),
        "the text": list(encodings(row["prompt"] + row["completion"] for row in rows)),
        "the weights": list(weight_bytes(plain_model(MODEL))),
    }


@pytest.fixture(scope="module", params=["veil", "obfuscatune"])
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[tuple[Parties, Written]]:
    """One run of each design: tuned with checkpoints, refused once, its services left up and its files in place."""
    directory = tmp_path_factory.mktemp("run")
    agreed = {"design": request.param, "model": model_directory(MODEL), "enclave.allow_simulated": True, **COMMON}
    made = Parties(directory, {**agreed, f"{request.param}.key_seed": KEY_SEED})
    text = directory / "owner" / "train.jsonl"
    own = {**tuning(text, 20), "session.retry_seconds": 20}
    try:
        for role in made.services:
            made.start(role, None, *HEALTH)
        places = run(made, own)
        yield made, Written({**places, **dict(files(made)), **dict(metrics(made))}, secrets_of(made, text))
    finally:
        made.end()


def run(made: Parties, own: dict[str, Any]) -> dict[str, bytes]:
    """Tune, look at the processes meanwhile, and be refused for another configuration and for a text that does not fit."""
    shown: dict[str, bytes] = {}
    owner = made.tune(own)
    for _ in polling(100):
        shown |= processes(made.running.values())
        time.sleep(0.2)
        if not owner.is_running:
            break
    assert owner.ended() == 0, owner.errors()
    for wrong in ({"lora.rank": 8}, {"data.max_length": 4}):
        output = str(made.output("owner").with_name("refused-" + "-".join(wrong)))
        refused = made.tune({**own, **wrong, "output": output})
        assert refused.ended() != 0
        assert "error: " in refused.errors()
    return shown


def test_nothing_secret_is_in_what_a_run_writes_and_shows(written: tuple[Parties, Written]) -> None:
    made, found = written
    for kind in (
        "process",
        "metrics of the host",
        "metrics of the enclave",
        "host/out/parties/host",
        "enclave/out/parties/enclave",
    ):
        assert any(place.startswith(kind) for place in found.places), kind
    assert {
        "owner/owner.err",
        "host/host.out",
        "owner/out/result.json",
        "owner/out/log/owner.log",
    } <= found.places.keys()
    assert any(place.endswith(".sealed") for place in found.places)
    assert found.leaks() == set()
    adapter = load_file(made.output("owner") / "adapter" / "adapter_model.safetensors")
    assert adapter, "what the owner paid for is there, and in the clear"


@pytest.mark.parametrize(
    "name", ["the owner's key", "the host's key", "the master secret", "the sealing key", "the text", "the weights"]
)
def test_what_is_planted_is_found(name: str, written: tuple[Parties, Written]) -> None:
    _, found = written
    for number, place in enumerate(("owner/owner.err", "metrics of the host", "owner/out/result.json")):
        for needle in found.secrets[name][:: max(1, len(found.secrets[name]) // 5)]:
            if len(needle) < 8:
                continue
            planted = Written({place: found.places[place] + bytes(number) + b"x" + needle + b"y"}, found.secrets)
            assert (place, name) in planted.leaks()


def test_the_search_finds_secrets_where_they_belong(written: tuple[Parties, Written]) -> None:
    """The keys in their own files, the text in the owner's, the weights in the provider's model."""
    made, found = written
    own: dict[str, bytes] = {f"the {r}'s key": private_file(made.directory / r, r).read_bytes() for r in made.roles}
    own["the text"] = (made.directory / "owner" / "train.jsonl").read_bytes()
    own["the sealing key"] = next(made.state("enclave").rglob(SIMULATED_KEY_FILE)).read_bytes()
    own["the weights"] = b"".join(path.read_bytes() for path in Path(model_directory(MODEL)).glob("*.safetensors"))
    for name, data in own.items():
        assert Written({name: data}, {name: found.secrets[name]}).leaks() == {(name, name)}
