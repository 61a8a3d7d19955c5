"""Four parties on four machines: network namespaces on a bridge, with keys, a rate, and a network that is taken away."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks._parties import COMMON, Parties, Program, parties, polling, tuning
from veiltune.training import COMMIT

IP, TC = shutil.which("ip") or "ip", shutil.which("tc") or "tc"
ROLES = ("owner", "provider", "enclave", "host")
STEPS = 30
SILENT_MS = 6000
RATE = 2_000_000
BURST_BYTES = 32 << 10
SHORT_SILENCE = f"""\
import veiltune.transport.stream as stream

stream._SILENCE.update(TCP_KEEPIDLE=3, TCP_KEEPINTVL=1, TCP_KEEPCNT=3, TCP_USER_TIMEOUT={SILENT_MS})
"""
"""Read by each interpreter as it starts: a machine is given up after 6 s, not 140."""
AGREED: dict[str, Any] = {
    **COMMON,
    "design": "veil",
    "model": "random:llama:3,32,4,259",
    "enclave.allow_simulated": True,
    "veil.key_seed": 5,
    "session.retry_seconds": 30,
}


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([IP, *words], check=True, capture_output=True, text=True, timeout=20)


def no_namespaces() -> str | None:
    """Why there can be none here."""
    if shutil.which(IP) is None or shutil.which(TC) is None:
        return "there is no `ip` or no `tc` on this machine"
    name = f"vt{os.getpid()}probe"
    try:
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "br0", "type", "bridge")
    except subprocess.CalledProcessError as error:
        return f"no network namespaces may be made here: {error.stderr.strip()}"
    finally:
        subprocess.run([IP, "netns", "del", name], capture_output=True, timeout=20, check=False)
    return None


pytestmark = pytest.mark.slow


@dataclass
class Network:
    """A machine for each party, and a switch between them."""

    switch: str
    machines: dict[str, str]
    addresses: dict[str, str]

    def connect(self, role: str, *, up: bool) -> None:
        """Take a machine's cable out at the switch, or put it in."""
        ip("-n", self.switch, "link", "set", role, "up" if up else "down")

    def shape(self, role: str, *words: str) -> None:
        """What leaves a machine passes through this."""
        subprocess.run(
            [TC, "-n", self.machines[role], "qdisc", "replace", "dev", "eth0", "root", *words],
            check=True,
            capture_output=True,
            timeout=20,
        )

    def sent_bytes(self, role: str) -> int:
        """What has left a machine so far."""
        (found,) = json.loads(ip("-n", self.machines[role], "-s", "-j", "link", "show", "eth0").stdout)
        return int(found["stats64"]["tx"]["bytes"])

    def unshape(self, role: str) -> None:
        """As it was."""
        command = [TC, "-n", self.machines[role], "qdisc", "del", "dev", "eth0", "root"]
        subprocess.run(command, capture_output=True, timeout=20, check=False)


@contextmanager
def network() -> Generator[Network]:
    """Namespaces with names of this process's own, gone afterwards whatever happened."""
    made = Network(
        f"vt{os.getpid()}switch",
        {role: f"vt{os.getpid()}{role}" for role in ROLES},
        {role: f"10.77.0.{number}" for number, role in enumerate(ROLES, 1)},
    )
    try:
        ip("netns", "add", made.switch)
        ip("-n", made.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", made.switch, "link", "set", "br0", "up")
        for role, machine in made.machines.items():
            ip("netns", "add", machine)
            ip("-n", made.switch, "link", "add", role, "type", "veth", "peer", "name", "eth0", "netns", machine)
            ip("-n", made.switch, "link", "set", role, "master", "br0", "up")
            ip("-n", machine, "address", "add", f"{made.addresses[role]}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", machine, "link", "set", device, "up")
        yield made
    finally:
        for name in (*made.machines.values(), made.switch):
            subprocess.run([IP, "netns", "del", name], capture_output=True, timeout=20, check=False)


@dataclass
class Place:
    """Services on their machines, and what an undisturbed run among processes of one machine gives."""

    network: Network
    made: Parties
    own: dict[str, Any]
    expected: list[float]

    def tune(self, *more: str) -> Program:
        return self.made.tune(self.own, *(more or ("--overwrite",)))

    def committed(self) -> int:
        path = self.made.output("owner") / COMMIT
        return json.loads(path.read_text(encoding="utf-8"))["step"] if path.exists() else 0

    def in_the_middle(self, owner: Program) -> None:
        """Wait until some steps of this very run are committed."""
        for _ in polling(100):
            assert owner.is_running, owner.errors()
            if 2 <= self.committed() < STEPS - 10:
                return


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Generator[Place]:
    if why := no_namespaces():
        pytest.skip(why)
    directory = tmp_path_factory.mktemp("machines")
    site = directory / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SHORT_SILENCE, encoding="utf-8")
    source = str(Path(__file__).parents[1] / "src")
    own = tuning(directory / "train.jsonl", STEPS)
    with network() as net:
        inside: dict[str, Sequence[str]] = {r: ("ip", "netns", "exec", m) for r, m in net.machines.items()}
        environment = {"PYTHONPATH": f"{site}{os.pathsep}{source}"}
        with parties(directory, AGREED, hosts=net.addresses, inside=inside, environment=environment) as made:
            yield Place(net, made, own, here(directory / "here", own))


def here(directory: Path, own: dict[str, Any]) -> list[float]:
    """The losses among processes of one machine, without services."""
    return completed(Parties(directory, AGREED).tune(own))["loss"]


def completed(program: Program) -> dict[str, Any]:
    assert program.ended() == 0, program.errors()
    return json.loads(program.printed())


@pytest.mark.ci
def test_four_machines_give_the_losses_of_one(place: Place) -> None:
    record = completed(place.tune())
    assert record["loss"] == place.expected
    assert all(
        f"{address}:" in place.made.addresses[role]
        for role, address in place.network.addresses.items()
        if role != "owner"
    )
    text = place.made.running["enclave"].printed() + place.made.running["host"].printed()
    assert "TLS, for the keys" in text
    assert "NOTHING IS ENCRYPTED" not in text


def test_a_slow_link_costs_time_and_nothing_else(place: Place) -> None:
    """What the enclave sends leaves no faster than its link takes it, and the losses are the same."""
    fast = completed(place.tune())
    place.network.shape("enclave", "tbf", "rate", f"{RATE}bit", "burst", str(BURST_BYTES), "latency", "400ms")
    before, begin = place.network.sent_bytes("enclave"), time.monotonic()
    try:
        slow = completed(place.tune())
        seconds = time.monotonic() - begin
        sent = place.network.sent_bytes("enclave") - before
    finally:
        place.network.unshape("enclave")
    assert slow["loss"] == fast["loss"] == place.expected
    assert 8 * (sent - BURST_BYTES) / RATE <= seconds
    medians = [record["cost"]["seconds_per_step"]["median"] for record in (fast, slow)]
    assert medians[1] > 1.5 * medians[0], "the link was not what held it up"


def test_a_delayed_link(place: Place) -> None:
    try:
        place.network.shape("enclave", "netem", "delay", "20ms")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel delays no packets: {error.stderr.decode().strip()}")
    try:
        assert completed(place.tune())["loss"] == place.expected
    finally:
        place.network.unshape("enclave")


def test_a_network_that_is_gone_for_a_moment_is_waited_for(place: Place) -> None:
    owner = place.tune()
    place.in_the_middle(owner)
    place.network.connect("host", up=False)
    time.sleep(1.0)  # what had arrived is still worked on
    before = place.committed()
    time.sleep(1.0)
    assert place.committed() == before < STEPS, "nothing goes on meanwhile"
    place.network.connect("host", up=True)
    assert completed(owner)["loss"] == place.expected


@pytest.mark.parametrize(
    ("parted", "said"),
    [
        pytest.param("host", "the host is not reached any more", marks=pytest.mark.ci),
        ("owner", "is not reached any more"),
    ],
)
def test_a_network_that_stays_away_ends_in_a_message_and_the_run_goes_on_later(
    place: Place, parted: str, said: str
) -> None:
    owner = place.tune()
    place.in_the_middle(owner)
    begin = time.monotonic()
    place.network.connect(parted, up=False)
    try:
        code = owner.ended(60)
        seconds = time.monotonic() - begin
    finally:
        place.network.connect(parted, up=True)
    errors = owner.errors()
    assert code == 4, errors
    assert said in errors
    assert "hint: " in errors
    assert "Traceback" not in errors
    assert SILENT_MS / 2000 < seconds < 40
    assert 2 <= place.committed() < STEPS
    assert completed(place.tune("--resume"))["loss"] == place.expected
