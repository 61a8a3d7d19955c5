"""What a party has when it starts: its role, the agreed configuration, its links, its own directory; and common courtesies."""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from veiltune.config import Config, Section
from veiltune.tee.enclave import SimulatedEnclave, check_evidence
from veiltune.transport.channel import Channel
from veiltune.transport.messages import Evidence, EvidenceRequest, Progress
from veiltune.transport.transcript import Meter

NONCE_BYTES = 32
Verb = Literal["tune", "generate", "evaluate", "probe", "provision"]

log = logging.getLogger(__name__)


class Job(Section):
    """What a session is for. Data, like the configuration.

    Attributes:
        verb: tune; generate; evaluate; ``probe`` (one forward, backward and a few steps, for verification); ``provision`` (the
            model reaches its places and nothing more).
        native: keep the configured dtype as it is stored, even where this machine would compute in another (``provision``).
        resume_step: the committed checkpoint to go back to first.
        prompt: what to generate from.
        settings: `transformers`' generation arguments.
        probe: token ids and steps of a probe.
    """

    verb: Verb
    native: bool = False
    resume_step: int | None = None
    prompt: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    probe: dict[str, Any] = Field(default_factory=dict)


@dataclass
class Party:
    """One party of a running session.

    Attributes:
        role: owner, provider, enclave or host.
        config: what all parties agreed on.
        options: the design's own options.
        job: what the session is for.
        links: channels to the other parties, by role.
        control: channel to the session's supervisor.
        meter: counts every message of ``links``.
        directory: this party's own state.
        figures: what it found out, for the record.
        reconnect: makes a link to a service, or a lost one anew, by role; ``None`` where there is none to be made.
        services: roles that already run as services.
    """

    role: str
    config: Config
    options: BaseModel
    job: Job
    links: Mapping[str, Channel]
    control: Channel
    meter: Meter
    directory: Path
    figures: dict[str, Any] = field(default_factory=dict)
    reconnect: Callable[[str], Channel] | None = None
    services: tuple[str, ...] = ()

    def dial_services(self) -> None:
        """Link up with the parties that run as services.

        Raises:
            PeerLostError: one is not there.
            ProtocolError: one has another session token.
        """
        if self.reconnect is not None:
            self.links = {**self.links, **{role: self.reconnect(role) for role in self.services}}

    def report(self, event: str, fields: dict[str, Any] | None = None) -> None:
        """Tell the supervisor of progress."""
        self.control.send(Progress(event, {"role": self.role, **(fields or {})}))

    def require_enclave(self, role: str = "enclave") -> None:
        """Have the enclave prove what it is, before anything secret goes to it.

        Raises:
            UserError: the evidence is simulated and that was not allowed.
            ProtocolError: the evidence does not verify.
        """
        nonce = secrets.token_bytes(NONCE_BYTES)
        self.links[role].send(EvidenceRequest(nonce))
        evidence = self.links[role].recv_as(Evidence).evidence
        label = check_evidence(
            evidence,
            nonce=nonce,
            fingerprint=self.config.fingerprint(),
            allow_simulated=self.config.enclave.allow_simulated,
        )
        self.figures["enclave"] = label
        self.report("attested", {"enclave": label})

    def prove_enclave(self, enclave: SimulatedEnclave, peers: tuple[str, ...]) -> None:
        """The enclave's side of `require_enclave`, once for each peer."""
        for peer in peers:
            request = self.links[peer].recv_as(EvidenceRequest)
            self.links[peer].send(Evidence(enclave.evidence(request.nonce)))


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    try:  # Linux's ru_maxrss survives exec, so a party would begin with the size of the process that started it
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
