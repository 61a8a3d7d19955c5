"""Evidence from the hardware this process runs in: by file input and output, no library.

SGX under Gramine: 64 bytes into ``/dev/attestation/user_report_data``, then the quote from ``quote`` beside it.
TDX and SEV-SNP: a directory in ``/sys/kernel/config/tsm/report``, 64 bytes into its ``inblob``, then ``outblob``, and for
SEV-SNP the certificates that the host provides in ``auxblob``.

*Reference*: Gramine's manual, "Attestation and secret provisioning"; Linux, ``Documentation/ABI/testing/configfs-tsm``;
AMD, "Guest-Hypervisor Communication Block Standardization", 56421, §4.1.8 (the table of certificates).
"""

from __future__ import annotations

import contextlib
import secrets
import struct
import uuid
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from veiltune.errors import AttestationError
from veiltune.tee.attestation.evidence import Evidence
from veiltune.tee.attestation.quote_layout import without_padding
from veiltune.tee.attestation.quotes import QuoteEvidence
from veiltune.tee.attestation.runtime import REPORT_DATA_BYTES
from veiltune.tee.attestation.snp import SnpEvidence
from veiltune.tee.attestation.snp_certificates import Chain

GRAMINE: Final = Path("/dev/attestation")
TSM: Final = Path("/sys/kernel/config/tsm/report")
_GUIDS: Final = {
    "vcek": uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd").bytes,
    "ask": uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782").bytes,
    "ark": uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae").bytes,
}
_ENTRY: Final = struct.Struct("<16sII")  # GUID, offset and length


def collect(
    report_data: bytes, *, gramine: Path = GRAMINE, tsm: Path = TSM, certificates: Path | None = None
) -> Evidence:
    """Fresh evidence for ``report_data`` from whatever hardware is there.

    Args:
        report_data: 64 bytes (`RuntimeData.report_data`).
        gramine: Gramine's directory.
        tsm: the kernel's directory of reports.
        certificates: directory with ``vcek.der``, ``ask.der`` and ``ark.der`` (or ``.pem``), for SEV-SNP hosts that
            provide none.

    Raises:
        AttestationError: no such hardware, or it did not answer as it should.
    """
    if len(report_data) != REPORT_DATA_BYTES:
        raise AttestationError(
            f"report data of {len(report_data)} bytes", hint=f"it is {REPORT_DATA_BYTES}: RuntimeData.report_data()"
        )
    try:
        if (gramine / "quote").exists():
            return _from_gramine(report_data, gramine)
        if tsm.is_dir():
            return _from_tsm(report_data, tsm, certificates)
    except OSError as error:
        raise AttestationError(
            f"the hardware gave no evidence: {error.strerror} ({error.filename})",
            hint="check that this process may use it, and that the host's attestation service runs",
        ) from None
    raise AttestationError(
        f"no trusted hardware here: neither {gramine} nor {tsm} exists",
        hint="run inside SGX under Gramine (sgx.remote_attestation = 'dcap') or in a TDX or SEV-SNP guest",
    )


def hardware_here(*, gramine: Path = GRAMINE, tsm: Path = TSM) -> bool:
    """Whether this process has trusted hardware to ask; that it answers is for `collect` to see."""
    return (gramine / "quote").exists() or tsm.is_dir()


def certificate_table(blob: bytes) -> Chain | None:
    """The chain in the table of certificates that a host provides; None where it lacks one of the three.

    Raises:
        AttestationError: an entry points outside the table.
    """
    found: dict[bytes, bytes] = {}
    for start in range(0, len(blob) - _ENTRY.size + 1, _ENTRY.size):
        guid, offset, length = _ENTRY.unpack_from(blob, start)
        if not any(guid):
            break
        if offset + length > len(blob):
            raise AttestationError(
                f"a certificate at {offset} … {offset + length} in a table of {len(blob)} bytes",
                hint="the host provided a malformed table of certificates",
            )
        found[guid] = blob[offset : offset + length]
    if not found.keys() >= set(_GUIDS.values()):
        return None
    return Chain(**{name: _as_der(found[guid], f"the host's {name}") for name, guid in _GUIDS.items()})


def _from_gramine(report_data: bytes, directory: Path) -> QuoteEvidence:
    kind = directory / "attestation_type"  # absent in old versions
    if kind.exists() and (name := _word(kind)) != "dcap":
        raise AttestationError(
            f"Gramine's remote attestation is {name!r}", hint="set sgx.remote_attestation = 'dcap' in the manifest"
        )
    (directory / "user_report_data").write_bytes(report_data)
    return QuoteEvidence(without_padding((directory / "quote").read_bytes()))


def _from_tsm(report_data: bytes, directory: Path, certificates: Path | None) -> Evidence:
    entry = _new_entry(directory)
    try:
        (entry / "inblob").write_bytes(report_data)
        out = (entry / "outblob").read_bytes()
        provider = _word(entry / "provider")
        table = (entry / "auxblob").read_bytes() if provider == "sev_guest" and (entry / "auxblob").exists() else b""
        writes = _word(entry / "generation")
    finally:
        with contextlib.suppress(OSError):  # only a few bytes of the kernel's are lost
            entry.rmdir()
    if writes != "1":
        raise AttestationError(
            f"the report in {entry} was asked for {writes} times", hint="another process wrote to it: try again"
        )
    if provider == "tdx_guest":
        return QuoteEvidence(without_padding(out))
    if provider == "sev_guest":
        return SnpEvidence(out, certificate_table(table) or _chain_in(certificates))
    raise AttestationError(f"evidence of the provider {provider!r}", hint="known here: tdx_guest, sev_guest")


def _new_entry(directory: Path) -> Path:
    """A directory of our own, which the kernel fills with the files of a report."""
    entry = directory / f"veiltune-{secrets.token_hex(8)}"
    entry.mkdir()
    return entry


def _chain_in(directory: Path | None) -> Chain:
    if directory is None:
        raise AttestationError(
            "the host provides no certificates for its SEV-SNP report",
            hint="fetch VCEK, ASK and ARK from AMD's key distribution service and name their directory",
        )
    return Chain(_certificate(directory, "vcek"), _certificate(directory, "ask"), _certificate(directory, "ark"))


def _certificate(directory: Path, name: str) -> bytes:
    path = next((path for ending in ("der", "pem") if (path := directory / f"{name}.{ending}").is_file()), None)
    if path is None:
        raise AttestationError(f"no {name}.der or {name}.pem in {str(directory)!r}", hint="fetch it from AMD")
    return _as_der(path.read_bytes(), str(path))


def _as_der(data: bytes, what: str) -> bytes:
    if not data.startswith(b"-----BEGIN"):
        return data
    try:
        return x509.load_pem_x509_certificate(data).public_bytes(Encoding.DER)
    except ValueError:
        raise AttestationError(f"{what} is not a certificate", hint="give DER or PEM") from None


def _word(path: Path) -> str:
    return path.read_text(encoding="ascii", errors="replace").strip()
