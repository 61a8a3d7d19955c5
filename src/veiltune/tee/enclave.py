"""The identity of a simulated enclave: evidence that says, signed, that it protects nothing.

Evidence is a JSON object of strings, made for a fresh nonce and for the fingerprint of the configuration that both
sides agreed to. Simulated evidence is a type of its own and never shaped like a hardware quote: whatever reads it as
one fails. The signature shows that the evidence was not altered after the holder of ``public_key`` made it; who that
is, and what it runs, it does not show. Hence clients refuse it unless told otherwise, and whoever accepts it records
the label that :func:`check_evidence` returns in logs and results.

    signature = Ed25519("veiltune/v1/simulated-evidence" + NUL + canonical JSON of every other field)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from veiltune.errors import ProtocolError, UserError
from veiltune.secrets import Secret

SIMULATED: Final = "simulated"
WARNING: Final = "SIMULATED ENCLAVE: no hardware stands behind it; it protects nothing from this machine's owner"
MIN_NONCE_BYTES: Final = 16
_DOMAIN: Final = b"veiltune/v1/simulated-evidence\x00"
_FIELDS: Final = frozenset({"kind", "warning", "nonce", "config_fingerprint", "public_key", "signature"})

log = logging.getLogger(__name__)


class SimulatedEnclave(Secret):
    """Stands where an enclave would stand, with a signing key made at start and kept in memory alone.

    Args:
        fingerprint: of the job's configuration, as both sides computed it.
    """

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint: Final = fingerprint
        self._signing_key: Final = Ed25519PrivateKey.generate()
        log.warning(WARNING)

    @property
    def label(self) -> str:
        """What logs and results call this enclave."""
        return SIMULATED

    def evidence(self, nonce: bytes) -> dict[str, str]:
        """Signed evidence for the client's ``nonce``, ready for JSON.

        Raises:
            ProtocolError: a nonce of fewer than 16 bytes.
        """
        if len(nonce) < MIN_NONCE_BYTES:
            raise ProtocolError(
                f"a nonce of {len(nonce)} bytes", hint=f"send {MIN_NONCE_BYTES} bytes or more, drawn for this request"
            )
        claims = {
            "kind": SIMULATED,
            "warning": WARNING,
            "nonce": nonce.hex(),
            "config_fingerprint": self.fingerprint,
            "public_key": self._signing_key.public_key().public_bytes_raw().hex(),
        }
        return {**claims, "signature": self._signing_key.sign(_to_be_signed(claims)).hex()}

    def _describe(self) -> str:
        return "SimulatedEnclave (signing key)"


def check_evidence(evidence: Mapping[str, object], *, nonce: bytes, fingerprint: str, allow_simulated: bool) -> str:
    """Verify an enclave's evidence, or raise; returns the label to record (``"simulated"``).

    Args:
        evidence: what the enclave sent.
        nonce: what this client drew for this request.
        fingerprint: of the configuration that this client agreed to.
        allow_simulated: whether this client was told to accept an enclave that protects nothing.

    Raises:
        UserError: the evidence is simulated and that was not allowed.
        ProtocolError: unknown or malformed evidence, a bad signature, another nonce or another configuration.
    """
    kind = evidence.get("kind")
    if kind != SIMULATED:
        raise ProtocolError(f"unknown kind of enclave evidence: {kind!r}", hint=f"known here: {SIMULATED!r}")
    if not allow_simulated:
        raise UserError(
            "the enclave is simulated, so it protects nothing from the host",
            hint="set enclave.allow_simulated = true to go on all the same (for tests and demonstrations)",
        )
    claims = {name: value for name, value in evidence.items() if isinstance(value, str)}
    if claims.keys() != _FIELDS or len(claims) != len(evidence):
        found = ", ".join(sorted(map(str, evidence)))
        raise ProtocolError(f"malformed enclave evidence: fields {found}", hint="both sides need the same version")
    _check_signature(claims)
    if claims["warning"] != WARNING:
        raise ProtocolError("simulated evidence without its warning", hint="both sides need the same version")
    if claims["nonce"] != nonce.hex():
        raise ProtocolError("the enclave's evidence is not for our nonce", hint="it may be a replay: ask it again")
    if claims["config_fingerprint"] != fingerprint:
        raise ProtocolError(
            f"the enclave runs the configuration {claims['config_fingerprint']}, we agreed to {fingerprint}",
            hint="start every party with the same configuration",
        )
    log.warning(WARNING)
    return SIMULATED


def _check_signature(claims: Mapping[str, str]) -> None:
    unsigned = {name: value for name, value in claims.items() if name != "signature"}
    try:
        public_key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(claims["public_key"]))
        public_key.verify(bytes.fromhex(claims["signature"]), _to_be_signed(unsigned))
    except (ValueError, InvalidSignature):
        raise ProtocolError(
            "the signature of the enclave's evidence does not verify", hint="it was altered on the way: ask it again"
        ) from None


def _to_be_signed(claims: Mapping[str, str]) -> bytes:
    return _DOMAIN + json.dumps(claims, sort_keys=True, separators=(",", ":")).encode()
