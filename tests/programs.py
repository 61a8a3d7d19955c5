"""What the tests of services share: configurations as files, and `veiltune party` as a program whose events can be waited for."""

from __future__ import annotations

import json
import queue
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._parties import as_toml
from commands import outside


def write_toml(directory: Path, settings: dict[str, Any], name: str = "run.toml") -> str:
    """Dotted keys as a TOML file; a list of tables comes last."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    peers = [(each["role"], each["key"]) for each in settings.get("peers", [])]
    text = as_toml({key: value for key, value in settings.items() if key != "peers"}, peers)
    path.write_text(text, encoding="utf-8")
    return str(path)


class Program:
    """`veiltune party ROLE`, with what it prints, line by line."""

    def __init__(
        self,
        config: str,
        role: str = "provider",
        *,
        listen: str = "127.0.0.1:0",
        more: tuple[str, ...] = (),
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.role = role
        self.config = config
        self.process = outside(
            ["party", role, config, "--listen", listen, "--json", *more], cwd=cwd, environment=environment
        )
        self.events: list[dict[str, Any]] = []
        self.errors = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._readers = [threading.Thread(target=each, daemon=True) for each in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors += line

    def wait_for(self, event: str, seconds: float = 100.0) -> dict[str, Any]:
        """The next event of this name."""
        deadline = time.monotonic() + seconds
        while True:
            line = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
            assert line is not None, self.errors
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event:
                return self.events[-1]

    def ready(self) -> str:
        """Its address, once it listens."""
        return self.wait_for("listening")["address"]

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and wait; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(60)
        for reader in self._readers:
            reader.join(30)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code

    def names(self) -> set[str]:
        """Events of which kinds there were."""
        return {event["event"] for event in self.events}
