"""The other side of `enclave`: what a party asks, and how it judges the answer by its own configuration and policy.

There is one round, within the channel. Where that is TLS, the proof names the keys of both its ends, so evidence that
somebody else fetched from a genuine enclave, and passes on, is for other keys and is refused; nothing secret is sent
before. Where the channel has no keys (the parties of one machine), nonce and configuration are bound, and the channel is as
good as the machine.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Final, NamedTuple

from veiltune.config import EnclaveConfig
from veiltune.errors import AttestationError, ConfigError
from veiltune.tee.attestation.evidence import decode_evidence, verify_evidence
from veiltune.tee.attestation.policy import Policy, load_policy
from veiltune.tee.attestation.runtime import NONCE_BYTES, RuntimeData
from veiltune.tee.attestation.simulated import SimulatedEvidence
from veiltune.tee.attestation.verdict import Verified
from veiltune.tee.container.keys import KEY_BYTES, Recipient
from veiltune.tee.enclave import ROLE
from veiltune.tee.proof import Proof

_NAME_ONE: Final = (
    "name a policy in enclave.policy; enclave.allow_simulated = true accepts a simulated one (tests, demonstrations)"
)


class Attested(NamedTuple):
    """An enclave that proved what it is.

    Attributes:
        verified: what it is.
        recipient: whom data keys are wrapped for; bound to this one proof.
    """

    verified: Verified
    recipient: Recipient


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a proof has to be made for.

    Attributes:
        nonce: 32 bytes drawn for this request.
        config_fingerprint: of the asker's own configuration.
        tls_spki_sha256: of the enclave's key, as the asker's channel saw it; empty where the channel has no keys.
        client_spki_sha256: of the asker's own key in that channel.
    """

    nonce: bytes
    config_fingerprint: str
    tls_spki_sha256: bytes = b""
    client_spki_sha256: bytes = b""

    @classmethod
    def fresh(cls, config_fingerprint: str, tls_spki_sha256: bytes = b"", client_spki_sha256: bytes = b"") -> Challenge:
        """One with a new nonce."""
        return cls(secrets.token_bytes(NONCE_BYTES), config_fingerprint, tls_spki_sha256, client_spki_sha256)

    def require(self, runtime: RuntimeData) -> None:
        """Compare with what the enclave claims.

        Raises:
            AttestationError: one of them differs.
        """
        runtime.require(
            nonce=self.nonce,
            tls_spki_sha256=self.tls_spki_sha256,
            config_fingerprint=self.config_fingerprint,
            client_spki_sha256=self.client_spki_sha256,
        )


def accepted_by(config: EnclaveConfig) -> Policy:
    """What a party accepts: its policy file's tables. A simulated enclave has to be allowed by each that is there.

    Raises:
        ConfigError: the policy file cannot be used.
    """
    if config.policy is None:
        return Policy(allow_simulated=config.allow_simulated)
    policy = load_policy(config.policy)
    return policy.model_copy(update={"allow_simulated": policy.allow_simulated and config.allow_simulated})


def verify_proof(proof: Proof, challenge: Challenge | None, policy: Policy, *, now: int | None = None) -> Attested:
    """Verify an enclave's proof, or raise.

    Args:
        proof: as it came.
        challenge: what it has to be for; ``None`` for evidence out of a file, of which nobody knows how old it is.
        policy: what is accepted.
        now: Unix time in seconds; this machine's clock by default.

    Raises:
        AttestationError: malformed, not genuine, not for ``challenge``, or not accepted.
    """
    runtime = RuntimeData.decode(proof.runtime)
    if challenge is not None:
        challenge.require(runtime)
    if len(runtime.hpke_key) != KEY_BYTES:
        raise AttestationError(
            f"the enclave's key for data keys has {len(runtime.hpke_key)} bytes", hint=f"X25519 has {KEY_BYTES}"
        )
    evidence = decode_evidence(proof.evidence)
    verified = verify_evidence(evidence, policy, runtime, int(time.time()) if now is None else now)
    return Attested(verified, Recipient(ROLE, runtime.hpke_key, proof.runtime_sha256))


def verify_enclave(proof: Proof, challenge: Challenge, config: EnclaveConfig) -> Attested:
    """Verify an enclave's proof as a run's configuration says.

    Raises:
        AttestationError: see `verify_proof`.
        ConfigError: the configuration accepts no enclave at all, or its policy cannot be used.
    """
    policy = accepted_by(config)
    if policy == Policy():
        is_simulated = isinstance(decode_evidence(proof.evidence), SimulatedEvidence)
        what = "simulated, so it protects nothing from the host" if is_simulated else "in hardware"
        raise ConfigError(f"the enclave is {what}; the configuration accepts none", hint=_NAME_ONE)
    return verify_proof(proof, challenge, policy)
