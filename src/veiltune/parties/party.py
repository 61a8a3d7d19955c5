"""What a party has when it starts: its role, the agreed configuration, its links, its own directory; and common courtesies."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from veiltune.config import Config, Section
from veiltune.peers import digest_of
from veiltune.tee.enclave import Enclave
from veiltune.tee.proof import Proof
from veiltune.tee.verifier import Attested, Challenge, verify_enclave
from veiltune.transport.channel import Channel
from veiltune.transport.messages import Evidence, EvidenceRequest, Progress
from veiltune.transport.secure_channel import SecureChannel
from veiltune.transport.session_link import SessionLink
from veiltune.transport.transcript import Meter

Verb = Literal["tune", "generate", "evaluate", "probe", "provision"]

log = logging.getLogger(__name__)


class Job(Section):
    """What a session is for. Data, like the configuration.

    Attributes:
        verb: tune; generate; evaluate; ``probe`` (one forward, backward and a few steps, for verification); ``provision`` (the
            model reaches its places and nothing more).
        native: keep the configured dtype as it is stored, even where this machine would compute in another (``provision``).
        resume_step: the committed checkpoint to go back to first.
        session: its number, among parties that are services; ``None`` where there are none.
        run: the run's number there, the same when it is resumed.
        prompt: what to generate from.
        settings: `transformers`' generation arguments.
        probe: token ids and steps of a probe.
    """

    verb: Verb
    native: bool = False
    resume_step: int | None = None
    session: str | None = None
    run: str | None = None
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

    def require_enclave(self, role: str = "enclave") -> Attested:
        """Have the enclave prove what it is, before anything secret goes to it.

        Returns:
            What it is, and whom data keys may be wrapped for.

        Raises:
            ConfigError: the configuration accepts no enclave, or its policy cannot be used.
            AttestationError: the evidence does not verify, or is not accepted.
        """
        link = self.links[role]
        mine, its = _keys_of(link)
        challenge = Challenge.fresh(self.config.fingerprint(), tls_spki_sha256=its, client_spki_sha256=mine)
        link.send(EvidenceRequest(challenge.nonce))
        answer = link.recv_as(Evidence)
        attested = verify_enclave(Proof(answer.evidence, answer.runtime), challenge, self.config.enclave)
        self.figures["enclave"] = attested.verified.label
        self.figures["attestation"] = attested.verified.record()
        self.report("attested", {"enclave": attested.verified.label})
        return attested

    def prove_enclave(self, enclave: Enclave, peers: tuple[str, ...]) -> dict[str, Proof]:
        """The enclave's side of `require_enclave`, once for each peer; returns what each was shown.

        Raises:
            AttestationError: a malformed request, or the hardware did not answer.
        """
        proofs: dict[str, Proof] = {}
        for peer in peers:
            link = self.links[peer]
            mine, its = _keys_of(link)
            nonce = link.recv_as(EvidenceRequest).nonce
            proof = enclave.prove(nonce, self.config.fingerprint(), tls_spki_sha256=mine, client_spki_sha256=its)
            link.send(Evidence(proof.evidence, proof.runtime))
            proofs[peer] = proof
        return proofs


def _keys_of(link: Channel) -> tuple[bytes, bytes]:
    """SHA-256 of this end's public key in a channel, and of the other's; empty where it has no keys."""
    wire = link.wire if isinstance(link, SessionLink) else link
    if not isinstance(wire, SecureChannel):
        return b"", b""
    return digest_of(wire.own_pin), digest_of(wire.peer_pin)


def how_it_ended(code: int) -> str:
    """The exit code of a process that has ended, in words."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


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
