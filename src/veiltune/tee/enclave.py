"""What an enclave has from its start to its end: the hardware that vouches for it, and the key that secrets are wrapped for.

Each proof is made for one request. It binds the asker's nonce, the fingerprint of the configuration, the keys of both ends
of the channel, and the enclave's own HPKE key. That key is made at the start and never leaves memory, so what is wrapped
for it opens nowhere else, and after a restart nowhere at all.

Without trusted hardware the enclave is simulated: its evidence is of a kind of its own, and says that it protects nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from veiltune.secrets import Secret
from veiltune.tee.attestation.collect import GRAMINE, TSM, collect, hardware_here
from veiltune.tee.attestation.evidence import encode_evidence
from veiltune.tee.attestation.runtime import RuntimeData
from veiltune.tee.attestation.simulated import SimulatedPlatform
from veiltune.tee.container.keys import RecipientKey
from veiltune.tee.proof import Proof

ROLE: Final = "enclave"


class Enclave(Secret):
    """An enclave that can prove itself, and open what was wrapped for it.

    Args:
        certificates: folder with AMD's certificates, for SEV-SNP hosts that provide none.
        key: the key that data keys are wrapped for; a fresh one if ``None``.
        gramine: see `attestation.collect`.
        tsm: see there.
    """

    def __init__(
        self,
        *,
        certificates: Path | None = None,
        key: RecipientKey | None = None,
        gramine: Path = GRAMINE,
        tsm: Path = TSM,
    ) -> None:
        self._certificates = certificates
        self._gramine, self._tsm = gramine, tsm
        self._key = RecipientKey(ROLE) if key is None else key
        self._simulated = None if hardware_here(gramine=gramine, tsm=tsm) else SimulatedPlatform()

    @property
    def is_simulated(self) -> bool:
        """No hardware stands behind it."""
        return self._simulated is not None

    def prove(
        self, nonce: bytes, config_fingerprint: str, *, tls_spki_sha256: bytes = b"", client_spki_sha256: bytes = b""
    ) -> Proof:
        """Fresh evidence for one request.

        Args:
            nonce: 32 bytes that the asker drew.
            config_fingerprint: of the enclave's own configuration, 64 hexadecimal digits.
            tls_spki_sha256: of the enclave's key in the channel to the asker; empty where the channel has none.
            client_spki_sha256: of the asker's key in that channel.

        Raises:
            AttestationError: a nonce of another length, or the hardware did not answer.
        """
        public_key = self._key.recipient.public_key
        runtime = RuntimeData(tls_spki_sha256, public_key, nonce, config_fingerprint, client_spki_sha256)
        report_data = runtime.report_data()
        if self._simulated is not None:
            evidence = self._simulated.evidence(report_data)
        else:
            evidence = collect(report_data, gramine=self._gramine, tsm=self._tsm, certificates=self._certificates)
        return Proof(encode_evidence(evidence), runtime.encode())

    def key_for(self, proof: Proof) -> RecipientKey:
        """The key that opens what was wrapped for whom ``proof`` convinced."""
        return self._key.bound_to(proof.runtime_sha256)

    def _describe(self) -> str:
        return f"Enclave {'simulated' if self.is_simulated else 'in hardware'}"
