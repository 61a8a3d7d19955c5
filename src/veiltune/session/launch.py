"""Starting the parties: wires between them, and a process or a thread for each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veiltune.config import Config
from veiltune.designs import DESIGNS, Design
from veiltune.environment import party_environment
from veiltune.parties.party import Job, Party, how_it_ended
from veiltune.session.dialling import dial, local_roles
from veiltune.session.opening import numbered
from veiltune.session.party_main import design_options, run_party
from veiltune.session.wiring import channel_options, observers_of, party_directory
from veiltune.transport.channel import Channel, memory_pair
from veiltune.transport.shared_memory import DEFAULT_ARENA_BYTES, SharedMemoryChannel, open_link
from veiltune.transport.stream import SocketChannel, accept, connect, listen_loopback, token_handshake
from veiltune.transport.transcript import Meter, Transcript

CONTROL = "supervisor"


@dataclass
class Running:
    """A started party.

    Attributes:
        role: which.
        control: the supervisor's end of its control channel.
        process: its process, or ``None`` for a thread.
        thread: its thread, or ``None``.
        links: its channels, for a thread (so that a stop can close them).
    """

    role: str
    control: Channel
    process: subprocess.Popen[bytes] | None = None
    thread: threading.Thread | None = None
    links: list[Channel] = field(default_factory=list)

    def how_it_died(self) -> str | None:
        """In words, if its process has ended by a signal or with an error."""
        if self.process is None or self.process.poll() in (None, 0):
            return None
        return how_it_ended(self.process.returncode)

    def stop(self, grace_seconds: float) -> None:
        """End it: politely by closing its control channel, then not."""
        self.control.close()
        for link in self.links:
            link.close()
        if self.thread is not None:
            self.thread.join(grace_seconds)
        if self.process is not None:
            try:
                self.process.wait(grace_seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def start_threads(config: Config, job: Job) -> list[Running]:
    """Every party as a thread of this process, over channels in memory: for tests, with the same bytes."""
    design = DESIGNS[config.design]
    observers = {role: observers_of(config, role) for role in design.roles}
    links: dict[str, dict[str, Channel]] = {role: {} for role in design.roles}
    for a, b in design.links:
        ends = memory_pair(
            a,
            b,
            a_options=channel_options(design, a, b, _present(observers[a])),
            b_options=channel_options(design, b, a, _present(observers[b])),
        )
        links[a][b], links[b][a] = ends
    started: list[Running] = []
    for role in design.roles:
        mine, theirs = memory_pair(CONTROL, role)
        party = _party(config, job, role, links[role], theirs, observers[role][0])
        thread = threading.Thread(
            target=_run_thread, args=(party, observers[role][1]), name=f"veiltune-{role}", daemon=True
        )
        started.append(Running(role, mine, thread=thread, links=list(links[role].values())))
    for running in started:
        if running.thread is not None:
            running.thread.start()
    return started


def _present(observers: tuple[Meter, Transcript | None]) -> tuple[Any, ...]:
    return tuple(observer for observer in observers if observer is not None)


def _run_thread(party: Party, transcript: Transcript | None) -> None:
    run_party(party)
    if transcript is not None:
        transcript.close()


def _party(config: Config, job: Job, role: str, links: Mapping[str, Channel], control: Channel, meter: Meter) -> Party:
    design = DESIGNS[config.design]
    directory = party_directory(config, role)
    directory.mkdir(parents=True, exist_ok=True)
    return Party(role, config, design_options(design, config.design_options), job, links, control, meter, directory)


# --- processes ----------------------------------------------------------------------------------------------------------


def start_processes(
    config: Config, job: Job, *, here: str | None = None, held: tuple[int, ...] = ()
) -> tuple[list[Running], Party | None]:
    """Every party as an operating-system process. Wires are inherited descriptors, so nothing listens anywhere.

    With ``here``, that role is not started but returned, for the caller to be it. ``held`` are descriptors that each process
    keeps open until it ends.
    """
    design = DESIGNS[config.design]
    local = local_roles(config, design)
    job = numbered(config, job)
    wires: dict[str, list[dict[str, Any]]] = {role: [] for role in local}
    for a, b in design.links:
        for me, peer, wire in _wire(config, design, a, b):
            wires[me].append({"peer": peer, **wire})
    started: list[Running] = []
    mine: Party | None = None
    (Path(config.output) / "log").mkdir(parents=True, exist_ok=True)
    for role in sorted(local, key=lambda role: role == here):
        ours, theirs = socket.socketpair()
        if role == here:
            mine, _ = attach(_start_record(config, job, role, wires[role], theirs.detach()))
            started.append(Running(role, SocketChannel(ours, CONTROL, role)))
        else:
            process = _spawn(config, _start_record(config, job, role, wires[role], theirs.fileno()), held)
            theirs.close()
            started.append(Running(role, SocketChannel(ours, CONTROL, role), process=process))
    return started, mine


def _wire(config: Config, design: Design, a: str, b: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Both ends of a link: (me, peer, descriptors); one end alone where the other is a service, none where both are."""
    local = local_roles(config, design)
    if a not in local or b not in local:
        if a in local:
            yield a, b, {"kind": "service", "fds": []}
        return
    if config.session.link == "shared_memory" and (a, b) == design.data_plane:
        ends = open_link(DEFAULT_ARENA_BYTES)
        yield a, b, {"kind": "shared_memory", "fds": list(ends[0]), "num_bytes": DEFAULT_ARENA_BYTES}
        yield b, a, {"kind": "shared_memory", "fds": list(ends[1]), "num_bytes": DEFAULT_ARENA_BYTES}
        return
    first, second = _tcp_pair() if config.session.link == "tcp" else socket.socketpair()
    yield a, b, {"kind": "socket", "fds": [first.detach()]}
    yield b, a, {"kind": "socket", "fds": [second.detach()]}


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection over loopback; the listener is gone before anything is sent."""
    token = os.urandom(32)
    listener = listen_loopback()
    ends: list[socket.socket] = []
    accepting = threading.Thread(
        target=lambda: ends.append(accept(listener, token_handshake(token, listening=True))), daemon=True
    )
    accepting.start()
    host, port = listener.getsockname()[:2]
    first = connect(host, port, token_handshake(token, listening=False))
    accepting.join()
    listener.close()
    return first, ends[0]


def _start_record(config: Config, job: Job, role: str, wires: list[dict[str, Any]], control_fd: int) -> dict[str, Any]:
    return {
        "role": role,
        "config": json.loads(config.to_json()),
        "job": job.model_dump(mode="json"),
        "wires": wires,
        "control": control_fd,
    }


def _spawn(config: Config, start: dict[str, Any], held: tuple[int, ...]) -> subprocess.Popen[bytes]:
    fds = [fd for wire in start["wires"] for fd in wire["fds"]]
    with (Path(config.output) / "log" / f"{start['role']}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "veiltune.session.worker"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[*fds, start["control"], *held],
            env=party_environment(threads=config.session.threads, frugal=start["job"]["native"]),
            start_new_session=True,  # Ctrl-C is the supervisor's to handle
        )
    for fd in fds:
        os.close(fd)  # ours, so that a party's death is noticed by its peers
    assert process.stdin is not None  # noqa: S101
    process.stdin.write(json.dumps(start).encode())
    process.stdin.close()
    return process


def attach(start: dict[str, Any]) -> tuple[Party, Transcript | None]:
    """In a party's process: the party from what `_spawn` sent."""
    config = Config.model_validate(start["config"])
    role = start["role"]
    design = DESIGNS[config.design]
    observers = observers_of(config, role)
    links: dict[str, Channel] = {}
    for wire in start["wires"]:
        options = channel_options(design, role, wire["peer"], _present(observers))
        if wire["kind"] == "service":
            continue  # dialled when the role begins: see `Party.dial_services`
        if wire["kind"] == "shared_memory":
            fds = (wire["fds"][0], wire["fds"][1], wire["fds"][2])
            links[wire["peer"]] = SharedMemoryChannel.from_fds(fds, wire["num_bytes"], role, wire["peer"], **options)
        else:
            links[wire["peer"]] = SocketChannel(socket.socket(fileno=wire["fds"][0]), role, wire["peer"], **options)
    control = SocketChannel(socket.socket(fileno=start["control"]), role, CONTROL)
    party = _party(config, Job.model_validate(start["job"]), role, links, control, observers[0])
    if config.session.connect:
        party.reconnect = _reconnecting(config, design, role, observers)
        party.services = tuple(wire["peer"] for wire in start["wires"] if wire["kind"] == "service")
    return party, observers[1]


def _reconnecting(
    config: Config, design: Design, role: str, observers: tuple[Meter, Transcript | None]
) -> Callable[[str], Channel]:
    def reconnect(peer: str) -> Channel:
        return dial(config, peer, channel_options(design, role, peer, _present(observers)), me=role)

    return reconnect
