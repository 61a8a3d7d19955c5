"""What an enclave answers when it is asked to prove itself, on the wire and in a file.

A file is one canonical JSON object (`attestation.wire`) of ``version`` and, in base64, ``evidence`` and ``runtime``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final, NamedTuple

from veiltune.errors import AttestationError, ConfigError
from veiltune.tee.attestation.evidence import MAX_EVIDENCE_BYTES
from veiltune.tee.attestation.runtime import MAX_RUNTIME_BYTES
from veiltune.tee.attestation.wire import canonical, from_base64, parse, require_fields, to_base64
from veiltune.tee.container.files import whole_file

VERSION: Final = 1
_MAX_BYTES: Final = 2 * (MAX_EVIDENCE_BYTES + MAX_RUNTIME_BYTES)
_FIELDS: Final = frozenset({"version", "evidence", "runtime"})
_WHAT: Final = "an evidence file"


class Proof(NamedTuple):
    """Evidence and what it is for. Both are public, and prove nothing before `verifier.verify_proof` has looked at them.

    Attributes:
        evidence: as `attestation.evidence` encodes it.
        runtime: as `attestation.runtime.RuntimeData` encodes it.
    """

    evidence: bytes
    runtime: bytes

    @property
    def runtime_sha256(self) -> bytes:
        """What keys that are wrapped for this proof are bound to."""
        return hashlib.sha256(self.runtime).digest()

    def encode(self) -> bytes:
        """The content of a file."""
        return canonical({"version": VERSION, "evidence": to_base64(self.evidence), "runtime": to_base64(self.runtime)})

    @classmethod
    def decode(cls, data: bytes) -> Proof:
        """What :meth:`encode` made; nothing of it is verified yet.

        Raises:
            AttestationError: anything else.
        """
        fields = parse(data, max_bytes=_MAX_BYTES, what=_WHAT)
        require_fields(fields, _FIELDS, _WHAT)
        if fields["version"] != VERSION:
            raise AttestationError(f"{_WHAT} of version {fields['version']!r}", hint=f"version {VERSION} is read here")
        return cls(
            from_base64(fields, "evidence", max_bytes=MAX_EVIDENCE_BYTES, what=_WHAT),
            from_base64(fields, "runtime", max_bytes=MAX_RUNTIME_BYTES, what=_WHAT),
        )


def write_proof(path: Path, proof: Proof) -> None:
    """Write an evidence file, in the place of one that is there.

    Raises:
        CheckpointError: the disk is full, or refuses.
    """
    with whole_file(path, replace=True) as file:
        file.write(proof.encode())


def read_proof(path: Path) -> Proof:
    """What `write_proof` wrote.

    Raises:
        ConfigError: it cannot be read.
        AttestationError: it is no evidence file.
    """
    try:
        with path.open("rb") as file:
            return Proof.decode(file.read(_MAX_BYTES + 1))
    except OSError as error:
        raise ConfigError(
            f"cannot read the evidence {str(path)!r}: {error.strerror}", hint="give a file that `veiltune attest` wrote"
        ) from None
