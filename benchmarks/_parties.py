"""Parties as programs of their own, with keys and directories of their own: for whoever kills, parts or watches them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import veiltune
from veiltune.designs import DESIGNS
from veiltune.transport.identity import make_identity, private_file

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
EVERY = 2
"""Steps from one checkpoint to the next."""
COMMON: dict[str, Any] = {
    "device": "cpu",
    "lora.rank": 4,
    "lora.init_seed": 1,
    "train.optimizer": "adamw",
    "session.threads": 1,
    "session.retry_seconds": 60,
}
"""What all configurations say here."""
_POLL_SECONDS = 0.002
_COLOURS = ("red", "green", "blue", "white", "black")
_THINGS = ("cat", "dog", "bird", "fish", "horse", "mouse")

Settings = Mapping[str, Any]


class Program:
    """``veiltune`` with some arguments. What it prints goes to files, so that nobody has to read for it to go on.

    Args:
        words: its arguments.
        log: the files' path, without what tells them apart; they are added to.
        inside: words before the command, such as those that enter a namespace.
        environment: beside this process's own.
    """

    def __init__(self, words: Sequence[str], log: Path, inside: Sequence[str], environment: Settings) -> None:
        self.out, self.err = log.with_suffix(".out"), log.with_suffix(".err")
        self._since = [path.stat().st_size if path.exists() else 0 for path in (self.out, self.err)]
        with self.out.open("ab") as out, self.err.open("ab") as err:
            self.process = subprocess.Popen(
                [*inside, sys.executable, "-m", "veiltune", *words],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process."""
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """It has not ended."""
        return self.process.poll() is None

    def printed(self) -> str:
        """What it has printed on stdout since it was started."""
        return self._tail(self.out, self._since[0])

    def errors(self) -> str:
        """What it has printed on stderr since it was started."""
        return self._tail(self.err, self._since[1])

    @staticmethod
    def _tail(path: Path, since: int) -> str:
        with path.open("rb") as file:
            file.seek(since)
            return file.read().decode("utf-8", "replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        """A service's events of one name."""
        lines = self.printed().split("\n")[:-1]  # the last may not be whole
        return [each for each in map(json.loads, lines) if each["event"] == name]

    def wait_for(self, name: str, seconds: float = 100.0) -> dict[str, Any]:
        """A service's first event of this name.

        Raises:
            TimeoutError: it did not come, or the service ended.
        """
        deadline = time.monotonic() + seconds
        while not (found := self.events(name)):
            if not self.is_running or time.monotonic() > deadline:
                raise TimeoutError(f"no event {name!r}: {self.errors()}")
            time.sleep(0.02)
        return found[0]

    def ended(self, seconds: float = 100.0) -> int:
        """Wait for its end; its exit code.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        return self.process.wait(seconds)

    def pids(self) -> list[int]:
        """Its process and the parties that it started."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="ascii").split()
        except OSError:
            return [self.pid]
        return [self.pid, *map(int, children)]

    def kill(self) -> None:
        """End it without a word, and whatever it started."""
        for pid in self.pids():
            kill(pid)
        self.process.wait()


def as_toml(settings: Settings, peers: Iterable[tuple[str, str]]) -> str:
    """A configuration by dotted keys, and ``[[peers]]``: roles with keys."""
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
    return "".join([*lines, *(f'[[peers]]\nrole = "{role}"\nkey = "{pin}"\n' for role, pin in peers)])


def kill(pid: int, how: signal.Signals = signal.SIGKILL) -> None:
    """Signal a process, if it is still there."""
    try:
        os.kill(pid, how)
    except ProcessLookupError:
        return


class Parties:
    """All parties of a design, each with its key and its directory under ``directory``.

    Args:
        directory: ``ROLE/`` holds a party's key, configuration, logs and ``out/``.
        agreed: what every party's configuration says, by dotted keys; ``design`` and ``model`` among them.
        hosts: the address of each party's machine; 127.0.0.1 unless given.
        inside: words before each party's command.
        environment: beside this process's own.
    """

    def __init__(
        self,
        directory: Path,
        agreed: Settings,
        *,
        hosts: Mapping[str, str] | None = None,
        inside: Mapping[str, Sequence[str]] | None = None,
        environment: Settings | None = None,
    ) -> None:
        self.directory = directory
        self.agreed = dict(agreed)
        self.design = DESIGNS[self.agreed["design"]]
        self.roles = tuple(self.design.roles)
        self.services = _dialled_first({role: self.design.dials(role) for role in self.design.can_serve})
        self.hosts = dict(hosts or {})
        self.inside = dict(inside or {})
        source = str(Path(veiltune.__file__).parents[1])
        ours = {"PYTHONPATH": source, "VEILTUNE_CACHE": str(directory / "cache")}
        self.environment = {**ENVIRONMENT, **ours, **(environment or {})}
        self.pins = {role: make_identity(directory / role, role).pin for role in self.roles}
        self.addresses: dict[str, str] = {}
        self.running: dict[str, Program] = {}

    def output(self, role: str) -> Path:
        """A party's output directory."""
        return self.directory / role / "out"

    def state(self, role: str) -> Path:
        """Where a party keeps its state; a service has a folder a run there."""
        return self.output(role) / "parties" / role

    def settings(self, role: str, own: Settings) -> dict[str, Any]:
        """A party's configuration by dotted keys. It links up with the services that were started, if any."""
        peers = [peer for peer in self.design.dials(role) if peer in self.addresses]
        connect = {f"session.connect.{peer}": self.addresses[peer] for peer in peers}
        key = str(private_file(self.directory / role, role))
        return {"output": str(self.output(role)), "identity.key": key, **self.agreed, **connect, **own}

    def write(self, role: str, own: Settings) -> Path:
        """A party's configuration as a file."""
        path = self.directory / role / "run.toml"
        path.write_text(as_toml(self.settings(role, own), self.pins.items()), encoding="utf-8")
        return path

    def program(self, role: str, *words: str) -> Program:
        """A command of a party's own machine."""
        return Program(words, self.directory / role / role, self.inside.get(role, ()), self.environment)

    def start(self, role: str, own: Settings | None = None, *more: str) -> Program:
        """A service, at its old address if it had one; only a new one is waited for."""
        config = self.write(role, own or {})
        address = self.addresses.get(role, f"{self.hosts.get(role, '127.0.0.1')}:0")
        made = self.program(role, "party", role, str(config), "--listen", address, "--json", *more)
        self.running[role] = made
        if role not in self.addresses:
            self.addresses[role] = made.wait_for("listening")["address"]
        return made

    def start_all(self) -> None:
        """Every service."""
        for role in self.services:
            self.start(role)

    def tune(self, own: Settings, *more: str) -> Program:
        """``veiltune tune`` by the owner."""
        config = self.write("owner", own)
        made = self.program("owner", "tune", str(config), "--json", *more)
        self.running["owner"] = made
        return made

    def end(self) -> None:
        """Kill whatever runs."""
        for program in self.running.values():
            program.kill()


@contextmanager
def parties(directory: Path, agreed: Settings, **arguments: Any) -> Generator[Parties]:
    """All services of a design, up; see `Parties`."""
    made = Parties(directory, agreed, **arguments)
    try:
        made.start_all()
        yield made
    finally:
        made.end()


def write_texts(path: Path, count: int = 12) -> Path:
    """A few texts to train on, one JSON object a line."""
    rows = [(_THINGS[n % len(_THINGS)], _COLOURS[n * 3 % len(_COLOURS)]) for n in range(count)]
    lines = [
        json.dumps({"prompt": f"The {thing} is {colour}. What colour is it?", "completion": f" {colour}"})
        for thing, colour in rows
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tuning(text: Path, steps: int) -> dict[str, Any]:
    """What an owner's configuration says of its text, which is written, and of its training."""
    return {
        "data.train": str(write_texts(text)),
        "data.max_length": 64,
        "train.steps": steps,
        "train.batch_size": 4,
        "train.learning_rate": 1e-2,
        "train.checkpoint_every": EVERY,
    }


def polling(seconds: float) -> Iterator[None]:
    """Come back every few milliseconds, for at most that long.

    Raises:
        TimeoutError: that long has passed.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"nothing happened for {seconds:g} s")


def _dialled_first(dials: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Roles in an order in which each comes after those that it dials."""
    order: list[str] = []
    while len(order) < len(dials):
        order += [role for role in dials if role not in order and set(dials[role]) & set(dials) <= set(order)]
    return tuple(order)
