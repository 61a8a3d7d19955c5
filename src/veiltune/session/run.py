"""One session: prepare the output directory, start the parties, watch them, and say in one line what went wrong if it did."""

from __future__ import annotations

import json
import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veiltune.config import Config
from veiltune.designs import DESIGNS, Design
from veiltune.errors import CheckpointError, ConfigError, PeerLostError, ProtocolError, VeiltuneError, nearest
from veiltune.parties.party import Job
from veiltune.results import write_json
from veiltune.session.dialling import check_connect
from veiltune.session.launch import Running, start_processes, start_threads
from veiltune.session.locking import sole_use
from veiltune.training import COMMIT
from veiltune.transport.messages import Interrupt, Message, PartyDone, PartyFailed, Progress
from veiltune.transport.transcript import Traffic, merge_traffic

OnEvent = Callable[[str, dict[str, Any]], None]
CONFIG = "config.json"
GRACE_SECONDS = 10.0
SETTLE_SECONDS = 3.0
"""After a first failure, how long to wait for the one that caused it."""


_OF_TRAINING = frozenset({"training", "step"})
_AFTER_TRAINING = frozenset({"measuring", "exported"})


class PartyFailure(VeiltuneError):  # noqa: N818 - what happened
    """A party ended badly: its own message, its hint and its exit code."""

    def __init__(self, role: str, failed: PartyFailed) -> None:
        super().__init__(failed.message, hint=failed.hint)
        self.role = role
        self.exit_code = failed.exit_code
        self.kind = failed.error


class PartyDied(VeiltuneError):  # noqa: N818 - what happened
    """A party's process ended without a word."""

    exit_code = 4


@dataclass
class Outcome:
    """What a session left: each party's own figures, all traffic, and whether it was interrupted."""

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=dict)
    wall_seconds: float = 0.0
    interrupted: bool = False

    @property
    def owner(self) -> dict[str, Any]:
        """The owner's figures: history, utility, answers."""
        return self.figures["owner"]


def prepare_output(config: Config, *, resume: bool, overwrite: bool) -> int | None:
    """Make the output directory ready; returns the step to resume from.

    Raises:
        ConfigError: it exists and neither ``resume`` nor ``overwrite`` was asked for; or a transcript is asked of nobody.
        CheckpointError: ``resume`` was, and there is no checkpoint of this configuration.
    """
    output = Path(config.output)
    design = DESIGNS[config.design]
    if config.train.method not in design.methods:
        raise ConfigError(
            f"train.method = {config.train.method!r}: {design.name} cannot train that",
            hint=f"it can: {', '.join(sorted(design.methods))}",
        )
    if config.adapter.to != "owner" and not design.enclaves:
        raise ConfigError(
            f"adapter.to = {config.adapter.to!r}: under {design.name} no enclave trains, and whoever trains has the adapter",
            hint="set adapter.to = 'owner' (with plug_in, offsite and offline give the provider what was trained)",
        )
    check_connect(config, design)
    if config.session.connect and not config.session.processes:
        raise ConfigError("session.connect needs session.processes = true", hint="leave session.processes out")
    _check_record(config, design)
    if resume:
        return _committed_step(config)
    if output.exists() and any(not path.name.startswith(f"{CONFIG}.") for path in output.iterdir()):  # torn by a kill
        if not overwrite:
            raise ConfigError(f"the output directory {str(output)!r} is not empty", hint="pass --resume or --overwrite")
        if not (output / CONFIG).is_file():
            raise ConfigError(
                f"{str(output)!r} is not a run of Veiltune, so it will not be overwritten",
                hint="choose another output directory",
            )
        _clear(output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / CONFIG, json.loads(config.to_json()))
    return None


def _check_record(config: Config, design: Design) -> None:
    for observer in config.session.record:
        if observer not in design.roles:
            raise ConfigError(f"session.record names no party: {observer!r}", hint=nearest(observer, design.roles))
        if config.session.connect and observer != "owner":
            raise ConfigError(
                f"session.record = [{observer!r}]: with session.connect the {observer} is a service, which records no transcript",
                hint="record a run whose parties are started here: leave session.connect out",
            )


def _clear(output: Path) -> None:
    """Empty a run's directory so that at any moment it is one: the commit goes first, and its configuration stays."""
    (output / COMMIT).unlink(missing_ok=True)
    for path in list(output.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != CONFIG:
            path.unlink()


def _committed_step(config: Config) -> int:
    path = Path(config.output) / COMMIT
    try:
        commit = json.loads(path.read_text(encoding="utf-8"))
        step, fingerprint = int(commit["step"]), commit["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"no checkpoint to resume in {str(config.output)!r} ({type(error).__name__})", hint="start without --resume"
        ) from None
    if fingerprint != config.run_fingerprint():
        raise CheckpointError(
            f"the checkpoint in {str(config.output)!r} was made with another configuration",
            hint="resume with the configuration in its config.json, or start anew with --overwrite",
        )
    return step


class Session:
    """The supervisor of one session's parties.

    Args:
        config: what they agree on.
        job: what they are to do.
        on_event: told of every party's progress.
        lock: what keeps others out of the output directory, for the parties' processes to hold.
    """

    def __init__(self, config: Config, job: Job, on_event: OnEvent, lock: int | None = None) -> None:
        self._held = () if lock is None else (lock,)
        self.config = config
        self.job = job
        self.on_event = on_event
        self.outcome = Outcome()
        self._inbox: queue.Queue[tuple[str, Message | None]] = queue.Queue()
        self._parties: dict[str, Running] = {}
        self._step = 0
        self._training = job.verb == "tune"
        self._interrupted = False

    def run(self) -> Outcome:
        """Start the parties and wait for all of them.

        A first KeyboardInterrupt while training asks the owner to save a checkpoint and stop. A second one stops at once, and so
        does one while measuring or generating: what was trained is committed before that begins.

        Raises:
            VeiltuneError: what made a party fail, in its own words.
        """
        begin = time.perf_counter()
        if self.config.session.processes:
            started, _ = start_processes(self.config, self.job, held=self._held)
        else:
            started = start_threads(self.config, self.job)
        for running in started:
            self._parties[running.role] = running
            threading.Thread(target=self._listen, args=(running,), daemon=True).start()
        try:
            self._watch()
        finally:
            for running in self._parties.values():
                running.stop(GRACE_SECONDS if len(self.outcome.figures) == len(self._parties) else 0.5)
        self.outcome.wall_seconds = time.perf_counter() - begin
        self.outcome.traffic = merge_traffic(figures.pop("traffic", {}) for figures in self.outcome.figures.values())
        self.outcome.interrupted = bool(self.outcome.owner.get("history", {}).get("interrupted"))
        return self.outcome

    def _listen(self, running: Running) -> None:
        """Pass what one party says to the inbox; ``None`` when it has gone."""
        try:
            while True:
                message = running.control.recv()
                self._inbox.put((running.role, message))
                if isinstance(message, (PartyDone, PartyFailed)):
                    return
        except (PeerLostError, ProtocolError):
            self._inbox.put((running.role, None))

    def _watch(self) -> None:
        while len(self.outcome.figures) < len(self._parties):
            try:
                role, message = self._inbox.get()
            except KeyboardInterrupt:
                self._interrupt()
                continue
            if isinstance(message, Progress):
                self._progress(message)
            elif isinstance(message, PartyDone):
                self.outcome.figures[role] = dict(message.fields)
            else:
                raise self._cause(role, message)

    def _progress(self, message: Progress) -> None:
        if message.event == "step":
            self._step = int(message.fields["step"])
        self._training = message.event in _OF_TRAINING or (self._training and message.event not in _AFTER_TRAINING)
        try:
            self.on_event(message.event, dict(message.fields))
        except KeyboardInterrupt:  # it came while the display was drawn
            self._interrupt()

    def _interrupt(self) -> None:
        """Have the owner save and stop; asked again, or where there is nothing to save, stop at once."""
        if self._interrupted or not self._training:
            raise KeyboardInterrupt
        self._interrupted = True
        self.on_event("interrupting", {"step": self._step})
        self._parties["owner"].control.send(Interrupt())

    def _cause(self, role: str, message: Message | None) -> VeiltuneError:
        """The failure that explains the others: a death or an error of its own before a lost peer."""
        failures: dict[str, Message | None] = {role: message}
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline and not any(self._explains(r, m) for r, m in failures.items()):
            try:
                role, message = self._inbox.get(timeout=0.1)
            except queue.Empty:
                continue
            if not isinstance(message, (Progress, PartyDone)):
                failures[role] = message
        for role, message in failures.items():
            if self._explains(role, message):
                return self._as_error(role, message)
        return self._as_error(*next(iter(failures.items())))

    def _explains(self, role: str, message: Message | None) -> bool:
        if isinstance(message, PartyFailed):
            return message.error != "PeerLostError"
        process = self._parties[role].process
        if process is not None:
            try:
                process.wait(1.0)
            except Exception:  # noqa: BLE001 - still running: it explains nothing
                return False
        return True

    def _as_error(self, role: str, message: Message | None) -> VeiltuneError:
        if isinstance(message, PartyFailed):
            return PartyFailure(role, message)
        how = self._parties[role].how_it_died() or "ended without a word"
        kept = (Path(self.config.output) / COMMIT).is_file()
        return PartyDied(
            f"the {role} {how} after step {self._step}; the others have stopped",
            hint="the last checkpoint is whole: run again with --resume" if kept else "run again with --overwrite",
        )


def run_session(
    config: Config,
    job: Job,
    *,
    on_event: OnEvent = lambda _name, _fields: None,
    resume: bool = False,
    overwrite: bool = False,
) -> Outcome:
    """Prepare the output directory and run one session.

    Raises:
        VeiltuneError: what made it fail.
    """
    with sole_use(Path(config.output)) as lock:
        step = prepare_output(config, resume=resume, overwrite=overwrite)
        if step is not None:
            job = job.model_copy(update={"resume_step": step})
        return Session(config, job, on_event, lock).run()
