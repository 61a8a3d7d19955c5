"""Simulated evidence: signed, and saying that it protects nothing.

It is a type of its own: three fields and a warning, never shaped like a quote or a report, so that nothing which reads
hardware evidence can take it for some. The signature shows that the evidence was not altered after the holder of
``public_key`` made it; who that is, and what it runs, it does not show.

    signature = Ed25519("veiltune/v1/simulated-evidence/2" + NUL + warning + NUL + report_data)
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from veiltune.errors import AttestationError
from veiltune.secrets import Secret
from veiltune.tee.attestation.runtime import REPORT_DATA_BYTES
from veiltune.tee.attestation.verdict import SIMULATED, Verified

WARNING: Final = "SIMULATED ENCLAVE: no hardware stands behind it; it protects nothing from this machine's owner"
PUBLIC_KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
_DOMAIN: Final = b"veiltune/v1/simulated-evidence/2\x00"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SimulatedEvidence:
    """Evidence without hardware.

    Attributes:
        report_data: 64 bytes, as a quote would have them.
        public_key: Ed25519, 32 bytes.
        signature: 64 bytes.
        warning: the sentence that is signed with it.
    """

    report_data: bytes
    public_key: bytes
    signature: bytes
    warning: str = WARNING


class SimulatedPlatform(Secret):
    """Stands where the hardware's signing key would be: a key made at start, kept in memory alone."""

    def __init__(self) -> None:
        self._signing_key: Final = Ed25519PrivateKey.generate()
        log.warning(WARNING)

    def evidence(self, report_data: bytes) -> SimulatedEvidence:
        """Simulated evidence for ``report_data``.

        Raises:
            AttestationError: it is not 64 bytes long.
        """
        if len(report_data) != REPORT_DATA_BYTES:
            raise AttestationError(
                f"report data of {len(report_data)} bytes", hint=f"it is {REPORT_DATA_BYTES}: RuntimeData.report_data()"
            )
        public_key = self._signing_key.public_key().public_bytes_raw()
        return SimulatedEvidence(report_data, public_key, self._signing_key.sign(_to_be_signed(report_data)))

    def _describe(self) -> str:
        return "SimulatedPlatform (signing key)"


def verify_simulated(evidence: SimulatedEvidence, report_data: bytes, *, allowed: bool) -> Verified:
    """Check simulated evidence, if the policy allows it at all.

    Raises:
        AttestationError: it is not allowed, altered, without its warning, or for other report data.
    """
    if not allowed:
        raise AttestationError(
            "the enclave is simulated, so it protects nothing from the host",
            hint="to go on all the same (tests, demonstrations), set allow_simulated = true in the policy, and in a run's "
            "configuration enclave.allow_simulated = true",
        )
    if evidence.warning != WARNING:
        raise AttestationError("simulated evidence without its warning", hint="both sides need the same version")
    try:
        key = Ed25519PublicKey.from_public_bytes(evidence.public_key)
        key.verify(evidence.signature, _to_be_signed(evidence.report_data))
    except (ValueError, InvalidSignature):
        raise AttestationError(
            "the signature of the simulated evidence does not verify", hint="it was altered on the way: ask again"
        ) from None
    if evidence.report_data != report_data:
        raise AttestationError(
            "the simulated evidence is for other runtime data", hint="it may be a replay: ask for fresh evidence"
        )
    log.warning(WARNING)
    return Verified(tee=SIMULATED, measurement="", tcb="none: no hardware")


def _to_be_signed(report_data: bytes) -> bytes:
    return _DOMAIN + WARNING.encode() + b"\x00" + report_data
