"""Four parties on four machines: network namespaces on a bridge, with keys, rates, delays, and a network that is taken away."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks._pace import UNHINDERED, Shape
from benchmarks._parties import COMMON, Parties, Program, parties, polling, tuning
from benchmarks._wire import End, NoWireError, wire
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


def plug_in(made: Network, role: str, shape: Shape | None, cables: ExitStack) -> None:
    """A cable from a machine to the switch: the kernel's own, or one with a rate and a delay."""
    machine = made.machines[role]
    if shape is None:
        ip("-n", made.switch, "link", "add", role, "type", "veth", "peer", "name", "eth0", "netns", machine)
    else:
        cables.enter_context(wire(End(made.switch, role), End(machine, "eth0"), shape))
    ip("-n", made.switch, "link", "set", role, "master", "br0", "up")
    ip("-n", machine, "address", "add", f"{made.addresses[role]}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        ip("-n", machine, "link", "set", device, "up")


@contextmanager
def network(shape: Shape | None = None) -> Generator[Network]:
    """Namespaces with names of this process's own, gone afterwards whatever happened; ``shape``: of every cable.

    Raises:
        NoWireError: this machine permits no cable with a shape.
    """
    prefix = f"vt{os.getpid()}{'' if shape is None else 'far'}"  # both kinds may be up
    made = Network(
        f"{prefix}switch",
        {role: f"{prefix}{role}" for role in ROLES},
        {role: f"10.77.0.{number}" for number, role in enumerate(ROLES, 1)},
    )
    try:
        ip("netns", "add", made.switch)
        ip("-n", made.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", made.switch, "link", "set", "br0", "up")
        with ExitStack() as cables:
            for role, machine in made.machines.items():
                ip("netns", "add", machine)
                plug_in(made, role, shape, cables)
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


@contextmanager
def on_machines(net: Network, directory: Path, agreed: dict[str, Any]) -> Generator[Parties]:
    """Services of a design, each on its machine."""
    site = directory / "site"
    site.mkdir(parents=True)
    (site / "sitecustomize.py").write_text(SHORT_SILENCE, encoding="utf-8")
    source = str(Path(__file__).parents[1] / "src")
    inside: dict[str, Sequence[str]] = {r: ("ip", "netns", "exec", m) for r, m in net.machines.items()}
    environment = {"PYTHONPATH": f"{site}{os.pathsep}{source}"}
    with parties(directory, agreed, hosts=net.addresses, inside=inside, environment=environment) as made:
        yield made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Generator[Place]:
    if why := no_namespaces():
        pytest.skip(why)
    directory = tmp_path_factory.mktemp("machines")
    own = tuning(directory / "train.jsonl", STEPS)
    with network() as net, on_machines(net, directory, AGREED) as made:
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


# --- machines that are far apart ----------------------------------------------------------------------------------------

FAR = (50e6, 25e-3)
"""Bits a second, and seconds each way, of a cable between a machine and the switch: between two machines there are two."""
TRIP = 2 * FAR[1]
TIMED_STEPS = 6
MEASURE = """\
import json, socket, statistics, sys, time

words, size = sys.argv[1:], 4 << 20
if words[0] == "listen":
    listener = socket.create_server((words[1], 0))
    print(listener.getsockname()[1], flush=True)
    for wanted in [1] * 5 + [size]:
        near, _ = listener.accept()
        with near:
            got = 0
            while got < wanted:
                got += len(near.recv(1 << 20))
            near.sendall(b"!")
    sys.exit()
connects, echoes = [], []
for number in [1] * 5 + [size]:
    begin = time.perf_counter()
    with socket.create_connection((words[1], int(words[2]))) as far:
        connected = time.perf_counter()
        far.sendall(bytes(number))
        far.recv(1)
        seconds = time.perf_counter() - connected
    connects.append(connected - begin)
    echoes.append(seconds)
print(json.dumps({"connect": min(connects), "echo": min(echoes), "rate": 8 * size / echoes[-1]}))
"""
"""There and back between two machines, by the kernel's own TCP: seconds to connect, to echo a byte, and bits a second."""


@pytest.fixture(scope="module")
def far() -> Generator[tuple[Network, Shape]]:
    """Machines on cables that hold nothing back yet."""
    if why := no_namespaces():
        pytest.skip(why)
    shape = Shape.create()
    try:
        with network(shape) as net:
            yield net, shape
    except NoWireError as error:
        pytest.skip(f"no TAP devices may be made here: {error}")
    finally:
        shape.close()


def between(net: Network, one: str, other: str) -> dict[str, float]:
    """`MEASURE` from one machine to another."""

    def command(role: str, *words: str) -> list[str]:
        return [IP, "netns", "exec", net.machines[role], sys.executable, "-c", MEASURE, *words]

    with subprocess.Popen(command(other, "listen", net.addresses[other]), stdout=subprocess.PIPE) as listening:
        try:
            assert listening.stdout is not None
            port = listening.stdout.readline().decode().strip()
            dialling = command(one, "dial", net.addresses[other], port)
            found = subprocess.run(dialling, check=True, capture_output=True, timeout=60)
        finally:
            listening.kill()
    return json.loads(found.stdout)


@contextmanager
def far_apart(shape: Shape) -> Generator[None]:
    shape.set(*FAR)
    try:
        yield
    finally:
        shape.set(*UNHINDERED)


@pytest.mark.ci
def test_a_wire_takes_the_time_that_it_is_said_to_take(far: tuple[Network, Shape]) -> None:
    net, shape = far
    near = between(net, "enclave", "host")
    with far_apart(shape):
        found = between(net, "enclave", "host")
    for there_and_back in ("connect", "echo"):
        assert near[there_and_back] < TRIP, "it is the wire that delays"
        assert 2 * TRIP <= found[there_and_back] < 4 * TRIP
    assert near["rate"] > FAR[0]
    assert FAR[0] / 4 < found["rate"] <= FAR[0], "it fills most of the cable, and no more than that"


def test_a_step_takes_as_many_trips_as_it_has_crossings(far: tuple[Network, Shape], tmp_path: Path) -> None:
    """`veil` beside `obfuscatune`, on the same machines and cables: what a delay adds to a step are its crossings' trips."""
    net, shape = far
    layers = 3
    runs: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        made: dict[str, Parties] = {}
        for design in ("veil", "obfuscatune"):
            agreed = {**COMMON, "design": design, "model": f"random:llama:{layers},16,2,259"}
            agreed |= {"enclave.allow_simulated": True, f"{design}.key_seed": 5, "session.retry_seconds": 30}
            made[design] = stack.enter_context(on_machines(net, tmp_path / design, agreed))
        own = {**tuning(tmp_path / "train.jsonl", TIMED_STEPS), "train.checkpoint_every": TIMED_STEPS}
        for design, each in made.items():
            runs[design] = [completed(each.tune(own, "--overwrite"))]
        with far_apart(shape):
            for design, each in made.items():
                runs[design].append(completed(each.tune(own, "--overwrite")))
    added: dict[str, float] = {}
    for design, (near, away) in runs.items():
        assert away["loss"] == near["loss"]
        added[design] = away["cost"]["seconds_per_step"]["median"] - near["cost"]["seconds_per_step"]["median"]
    owners = 4  # a batch, its loss, the step, that it is done
    at_least = {"veil": 3 + owners, "obfuscatune": 8 * layers + owners}  # each waits for the one before it
    at_most = {design: near["cost"]["crossings_per_step"] + owners for design, (near, _) in runs.items()}
    for design, seconds in added.items():
        # Nothing arrives early. Four processes take turns at a message, which others' load may make late, by half a trip.
        assert 0.9 * at_least[design] * TRIP < seconds < 1.5 * at_most[design] * TRIP, (added, at_most)
    quotient = added["obfuscatune"] / added["veil"]
    low, high = (one["obfuscatune"] / other["veil"] for one, other in ((at_least, at_most), (at_most, at_least)))
    assert low < quotient < high
