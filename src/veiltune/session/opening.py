"""The first words of a session with parties that run as services: the owner says what it is for, and all pass it on.

A service is started without knowing what for. The links of one session find one another by its number; what was kept of an
earlier session of the same run is found again by the run's.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from pydantic import ValidationError

from veiltune.config import Config
from veiltune.designs import DESIGNS
from veiltune.errors import ConfigError, PeerLostError, ProtocolError
from veiltune.parties.party import Job, Party
from veiltune.transport.messages import Acknowledged, OpenSession
from veiltune.transport.refusals import SAME_CONFIG
from veiltune.transport.session_link import SessionLink

RUN_FILE = "run.id"
_NUMBER = re.compile(r"[0-9a-f]{32}")


def numbered(config: Config, job: Job) -> Job:
    """The job with a session's number, and the run's, where services of this design need them; else as it is.

    Raises:
        ConfigError: the output's file of the run's number holds something else.
    """
    if not DESIGNS[config.design].by_session & config.session.connect.keys():
        return job
    path = Path(config.output) / RUN_FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(16) + "\n", encoding="ascii")
    run = path.read_text(encoding="utf-8", errors="replace").strip()
    if not _NUMBER.fullmatch(run):
        raise ConfigError(f"{str(path)!r} holds no number of a run", hint="start anew with --overwrite")
    return job.model_copy(update={"session": secrets.token_hex(16), "run": run})


def link_up(party: Party) -> None:
    """Dial the services, and open the session with those that want it opened.

    Raises:
        PeerLostError: one is not there, or does not answer.
        VeiltuneError: one refuses, in its own words.
    """
    party.dial_services()
    if DESIGNS[party.config.design].by_session.isdisjoint(party.services):
        return
    links = {role: SessionLink(party.links[role]) for role in party.services}
    party.links = {**party.links, **links}
    opening = opening_of(party)
    for link in links.values():
        link.send(opening)
    seconds = 2 * party.config.session.retry_seconds + 30  # it waits for others, and for its turn
    for role, link in links.items():
        try:
            link.recv_as(Acknowledged, seconds)
        except PeerLostError as error:
            raise PeerLostError(f"no session with the {role}: {error.message}", hint=error.hint) from None


def opening_of(party: Party) -> OpenSession:
    """What a party says of the session. Of the owner's job only what others must know."""
    job = party.job
    return OpenSession(
        session=job.session or "",
        run=job.run or "",
        verb=job.verb,
        native=job.native,
        resume_step=job.resume_step,
        seed=party.config.seed,
        agreed=party.config.fingerprint(),
    )


def job_of(opening: OpenSession, config: Config) -> Job:
    """What a service is to do.

    Raises:
        ProtocolError: the opening is malformed, or the other end's configuration differs in what is agreed on.
    """
    if not (_NUMBER.fullmatch(opening.session) and _NUMBER.fullmatch(opening.run)):
        raise ProtocolError("a session's opening without the numbers of session and run", hint="use one version")
    if opening.agreed != config.fingerprint():
        raise ProtocolError(
            f"another configuration, {opening.agreed[:16]}…; this one's is {config.fingerprint()[:16]}…",
            hint=SAME_CONFIG,
        )
    names = ("verb", "native", "resume_step", "session", "run")
    try:
        job = Job.model_validate({name: getattr(opening, name) for name in names})
    except ValidationError:
        job = None
    if job is None or (job.resume_step or 0) < 0:
        raise ProtocolError(
            f"a session's opening for {opening.verb!r} at step {opening.resume_step}", hint="use one version"
        )
    return job
