"""Sessions of a party that is a service under a design with an enclave: links that belong together meet, and the role is run.

A session begins when everybody who links up with this party has come with the same number and the same words of the owner's.
Then this party links up with those it deals with itself, and each has answered before anyone is answered here: what the
owner is told is ready is ready everywhere. Sessions take turns, for a session draws from the process's own random state.

A session that comes for a run whose earlier session is still open ends the earlier one: its owner has come back.

*State.* What a run's checkpoints leave is kept under the party's directory, in a folder named by a hash of the run's number
and the key of whoever opened it, so an owner finds its own runs alone. Folders of runs without a checkpoint are removed.
"""

from __future__ import annotations

import gc
import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from veiltune.config import Config
from veiltune.designs import Design
from veiltune.errors import PeerLostError, ProtocolError, VeiltuneError, storage_fault
from veiltune.parties.party import Job, Party
from veiltune.session.dialling import dial
from veiltune.session.opening import job_of, link_up
from veiltune.session.party_main import design_options
from veiltune.session.wiring import channel_options, party_directory
from veiltune.transport.channel import Channel
from veiltune.transport.messages import Acknowledged, OpenSession
from veiltune.transport.session_link import SessionLink
from veiltune.transport.stream import SocketChannel
from veiltune.transport.transcript import Meter

OPEN_SECONDS = 30.0
MAX_WAITING = 32
"""Links that may wait for others of their session, or for their turn."""
_IDLE_SECONDS = 0.5
_POLL_SECONDS = 0.05

MakeControl = Callable[[], Channel]


@dataclass
class Meeting:
    """One session: its links as they come, those that this party opened itself, and how far it is."""

    opening: OpenSession
    job: Job
    links: dict[str, SessionLink] = field(default_factory=dict)
    dialled: dict[str, Channel] = field(default_factory=dict)
    opened: list[SessionLink] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """Close all of its links."""
        for link in (*self.links.values(), *self.dialled.values()):
            link.close()

    def abort(self) -> None:
        """End it from another thread, whatever it waits for."""
        for link in (*self.links.values(), *self.dialled.values()):
            if isinstance(link, (SessionLink, SocketChannel)):
                link.abort()

    def refuse(self, error: VeiltuneError) -> None:
        """Tell everybody who came why it ends, and those it was opened with, who would find no more than a lost link."""
        told = [*self.links.values()]
        if not isinstance(error, PeerLostError):
            told += self.opened
        for link in told:
            link.refuse(error)
        for link in told:
            link.drain()


class Meetings:
    """The sessions of one role of one design, one after another.

    Args:
        config: the service's own.
        role: which.
        design: whose role.
        meter: counts what crosses.
        control: makes a party's link to its supervisor.
    """

    def __init__(self, config: Config, role: str, design: Design, meter: Meter, control: MakeControl) -> None:
        self.config = config
        self.role = role
        self.design = design
        self.meter = meter
        self._control = control
        self._guard = threading.Lock()
        self._turn = threading.Lock()
        self._meetings: dict[str, Meeting] = {}
        self._waiting = 0
        self._current: Meeting | None = None
        self._stopping = False

    def serve(self, channel: Channel) -> bool:
        """See one link through its session. True at the one link of a session that ran it.

        Raises:
            VeiltuneError: what the session ended for; the other ends were told.
        """
        link = SessionLink(channel)
        try:
            opening = link.recv_as(OpenSession, OPEN_SECONDS)
            meeting = self._arrive(link, opening)
            is_last = meeting.links.keys() >= self._comers
            if not is_last:
                self._wait(meeting)
        except VeiltuneError as error:
            link.refuse(error)
            link.drain()
            raise
        if is_last:
            self._run(meeting)
        return is_last

    @property
    def _comers(self) -> set[str]:
        return set(self.design.is_dialled_by(self.role))

    def _arrive(self, link: SessionLink, opening: OpenSession) -> Meeting:
        job = job_of(opening, self.config)
        with self._guard:
            if self._stopping or self._waiting >= MAX_WAITING:
                why = "is being stopped" if self._stopping else f"has {self._waiting} links waiting"
                raise PeerLostError(f"this {self.role} {why}", hint="try again later")
            meeting = self._meetings.setdefault(opening.session, Meeting(opening, job))
            if meeting.opening != opening:
                raise ProtocolError(f"the parties do not say the same of session {opening.session[:8]}…")
            if link.peer in meeting.links or meeting.begun.is_set():
                raise ProtocolError(f"session {opening.session[:8]}… has its {link.peer} already")
            meeting.links[link.peer] = link
            self._waiting += 1
            if meeting.links.keys() >= self._comers:
                meeting.begun.set()
            return meeting

    def _leave(self, meeting: Meeting, count: int) -> None:
        with self._guard:
            self._waiting -= count
            self._meetings.pop(meeting.opening.session, None)

    def _wait(self, meeting: Meeting) -> None:
        """For the others of a session, then for its end: the link is in use by another thread until then."""
        if not meeting.begun.wait(self.config.session.retry_seconds):
            with self._guard:
                is_late = not meeting.begun.is_set()
                if is_late:  # nobody can join any more
                    self._meetings.pop(meeting.opening.session, None)
                    self._waiting -= 1
            if is_late:
                missing = " and the ".join(sorted(self._comers - meeting.links.keys()))
                raise PeerLostError(
                    f"the {missing} did not come to this session within {self.config.session.retry_seconds:g} s",
                    hint=f"is every address of the {missing}'s session.connect right, and its service up?",
                )
        meeting.ended.wait()

    def _run(self, meeting: Meeting) -> None:
        try:
            with self._own_turn(meeting):
                self._act(meeting)
        except VeiltuneError as error:
            meeting.refuse(error)
            raise
        except Exception as error:
            if fault := storage_fault(error, f"the {self.role}'s"):
                meeting.refuse(fault)
                raise fault from error
            # The text of a foreign exception may quote data, so only its type leaves this process.
            meeting.refuse(ProtocolError(f"internal error: {type(error).__name__}", hint="its log has the details"))
            raise
        finally:
            meeting.close()
            meeting.ended.set()
            self._leave(meeting, len(meeting.links))

    @contextmanager
    def _own_turn(self, meeting: Meeting) -> Generator[None]:
        earlier = self._current
        if earlier is not None and earlier.opening.run == meeting.opening.run:
            earlier.abort()
        if not self._turn.acquire(timeout=self.config.session.retry_seconds):
            raise PeerLostError(f"this {self.role} is in another session", hint="try again later")
        try:
            self._current = meeting
            if self._stopping:
                raise PeerLostError(f"this {self.role} is being stopped", hint="try again later")
            yield
        finally:
            self._current = None
            self._turn.release()

    def _act(self, meeting: Meeting) -> None:
        directory = self._directory(meeting)
        directory.mkdir(parents=True, exist_ok=True)
        party = self._party(meeting, directory)
        try:
            link_up(party)
            for role in party.services:
                link = party.links[role]
                if isinstance(link, SessionLink):
                    meeting.opened.append(link)
                    link.on_stopping = lambda: self._tell_to_stop(meeting)
            for link in meeting.links.values():
                link.send(Acknowledged())
            self.design.roles[self.role](party)
        finally:
            party.control.close()
            if not any(directory.glob("step-*")):
                shutil.rmtree(directory, ignore_errors=True)
            gc.collect()  # a model is full of cycles, and the next session's needs the room

    def _directory(self, meeting: Meeting) -> Path:
        opener = meeting.links.get("owner") or next(iter(meeting.links.values()))
        name = hashlib.sha256(f"{opener.pin}\0{meeting.opening.run}".encode()).hexdigest()[:32]
        return party_directory(self.config, self.role) / name

    def _party(self, meeting: Meeting, directory: Path) -> Party:
        config = self.config.model_copy(update={"seed": meeting.opening.seed})

        def reconnect(peer: str) -> Channel:
            channel = dial(config, peer, channel_options(self.design, self.role, peer, (self.meter,)), me=self.role)
            meeting.dialled[peer] = channel
            return channel

        options = design_options(self.design, config.design_options)
        links: dict[str, Channel] = dict(meeting.links)
        return Party(
            self.role,
            config,
            options,
            meeting.job,
            links,
            self._control(),
            self.meter,
            directory,
            reconnect=reconnect,
            services=self.design.dials(self.role),
        )

    # --- stopping -----------------------------------------------------------------------------------------------------

    def _tell_to_stop(self, meeting: Meeting) -> None:
        for peer, link in meeting.links.items():
            if "StopSoon" in self.design.may_receive(peer):
                link.tell_to_stop()

    def stop(self, seconds: float) -> None:
        """Begin no more, and let the open session end at the next step's end; after that many seconds, end it.

        Where training needs no more of this party than that it is there, the session is ended when nothing is in progress.
        """
        with self._guard:
            self._stopping = True
            waiting = [each for each in self._meetings.values() if each is not self._current]
        for each in waiting:
            each.abort()
        meeting = self._current
        if meeting is None:
            return
        works = self.role == self.design.trainer or not self.design.dials(self.role)
        if works:
            self._tell_to_stop(meeting)
        deadline = time.monotonic() + seconds
        idle_since = time.monotonic()
        while time.monotonic() < deadline and not meeting.ended.wait(_POLL_SECONDS):
            if works or not all(link.is_waiting for link in meeting.links.values()):
                idle_since = time.monotonic()
            if time.monotonic() - idle_since > _IDLE_SECONDS:
                break
        meeting.abort()
        meeting.ended.wait(OPEN_SECONDS)
