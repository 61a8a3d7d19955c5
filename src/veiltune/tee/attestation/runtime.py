"""Runtime data: what an enclave binds to its hardware evidence, and how it becomes the 64 bytes of report data.

    report_data = SHA-512("veiltune/v1/report-data" + NUL + canonical JSON of the runtime data)

A client recomputes it from the nonce that it drew, the certificate that it was shown and the configuration that it
agreed to, so that evidence made for another request, another channel or another job does not verify. Nothing in it is
secret.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from veiltune.errors import AttestationError
from veiltune.tee.attestation.wire import canonical, from_base64, parse, require_fields, to_base64

VERSION: Final = 1
NONCE_BYTES: Final = 32
DIGEST_BYTES: Final = 32
NO_CONFIG: Final = "0" * 64
"""The fingerprint in evidence that is for no run."""
REPORT_DATA_BYTES: Final = 64
MAX_HPKE_KEY_BYTES: Final = 2048  # X25519 has 32, X-Wing 1216
MAX_RUNTIME_BYTES: Final = 8192
_DOMAIN: Final = b"veiltune/v1/report-data\x00"
_WHAT: Final = "runtime data"
_FIELDS: Final = frozenset(
    {"version", "tls_spki_sha256", "client_spki_sha256", "hpke_key", "nonce", "config_fingerprint"}
)


@dataclass(frozen=True, slots=True)
class RuntimeData:
    """What evidence speaks for.

    Attributes:
        tls_spki_sha256: SHA-256 of the SubjectPublicKeyInfo of the enclave's TLS certificate; empty where no TLS is between,
            and in evidence that is kept in a file.
        hpke_key: the enclave's public key that data keys are wrapped for.
        nonce: 32 bytes that the client drew for this request.
        config_fingerprint: SHA-256 (hex) of the configuration, as `Config.fingerprint` gives it.
        client_spki_sha256: of the client's certificate, where the channel has keys; else empty.

    Raises:
        AttestationError: a field of another length or form.
    """

    tls_spki_sha256: bytes
    hpke_key: bytes
    nonce: bytes
    config_fingerprint: str
    client_spki_sha256: bytes = b""

    def __post_init__(self) -> None:
        lengths = {
            "tls_spki_sha256": (len(self.tls_spki_sha256), {0, DIGEST_BYTES}),
            "client_spki_sha256": (len(self.client_spki_sha256), {0, DIGEST_BYTES}),
            "nonce": (len(self.nonce), {NONCE_BYTES}),
            "hpke_key": (len(self.hpke_key), range(32, MAX_HPKE_KEY_BYTES + 1)),
        }
        for name, (length, allowed) in lengths.items():
            if length not in allowed:
                raise AttestationError(f"{_WHAT}: {name} has {length} bytes", hint="both sides need the same version")
        if not re.fullmatch("[0-9a-f]{64}", self.config_fingerprint):
            raise AttestationError(
                f"{_WHAT}: config_fingerprint is {self.config_fingerprint[:80]!r}", hint="it is 64 hex digits"
            )

    def encode(self) -> bytes:
        """Canonical JSON, to be sent and hashed."""
        return canonical(
            {
                "version": VERSION,
                "tls_spki_sha256": to_base64(self.tls_spki_sha256),
                "client_spki_sha256": to_base64(self.client_spki_sha256),
                "hpke_key": to_base64(self.hpke_key),
                "nonce": to_base64(self.nonce),
                "config_fingerprint": self.config_fingerprint,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> RuntimeData:
        """What :meth:`encode` made.

        Raises:
            AttestationError: anything else.
        """
        fields = parse(data, max_bytes=MAX_RUNTIME_BYTES, what=_WHAT)
        require_fields(fields, _FIELDS, _WHAT)
        if fields["version"] != VERSION or not isinstance(fields["config_fingerprint"], str):
            raise AttestationError(
                f"{_WHAT} of version {fields['version']!r}", hint=f"version {VERSION} is read here; update one side"
            )
        return cls(
            from_base64(fields, "tls_spki_sha256", max_bytes=DIGEST_BYTES, what=_WHAT),
            from_base64(fields, "hpke_key", max_bytes=MAX_HPKE_KEY_BYTES, what=_WHAT),
            from_base64(fields, "nonce", max_bytes=NONCE_BYTES, what=_WHAT),
            fields["config_fingerprint"],
            from_base64(fields, "client_spki_sha256", max_bytes=DIGEST_BYTES, what=_WHAT),
        )

    def report_data(self) -> bytes:
        """The 64 bytes that the hardware signs."""
        return hashlib.sha512(_DOMAIN + self.encode()).digest()

    def require(
        self, *, nonce: bytes, tls_spki_sha256: bytes, config_fingerprint: str, client_spki_sha256: bytes = b""
    ) -> None:
        """Compare what an enclave claims with what the client drew, saw and agreed to.

        It says which of them differs; that the claims are the enclave's own is for `verify_evidence` to show.

        Raises:
            AttestationError: one of them differs.
        """
        if self.nonce != nonce:
            raise AttestationError("the enclave's evidence is not for our nonce", hint="it may be a replay: ask again")
        if self.tls_spki_sha256 != tls_spki_sha256:
            raise AttestationError(
                "the enclave's evidence is for another TLS key than the one we were shown",
                hint="somebody stands between: go no further",
            )
        if self.client_spki_sha256 != client_spki_sha256:
            raise AttestationError(
                "the enclave's evidence is for another client than we are", hint="it may be relayed: go no further"
            )
        if self.config_fingerprint != config_fingerprint:
            raise AttestationError(
                f"the enclave runs the configuration {self.config_fingerprint}, we agreed to {config_fingerprint}",
                hint="start every party with the same configuration",
            )
