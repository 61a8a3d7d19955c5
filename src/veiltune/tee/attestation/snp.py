"""SEV-SNP attestation reports, verified with `cryptography` under one table of a policy.

*Reference*: AMD, "SEV Secure Nested Paging Firmware ABI Specification", 56860, §7.3, table 23. Little-endian::

    offset  size
    0x000   4     version, 2 … 5
    0x008   8     guest policy: bit 18 migration agent, bit 19 debug
    0x030   4     VMPL that asked for the report
    0x034   4     signature algorithm: 1 = ECDSA P-384 with SHA-384
    0x048   4     bits 2 … 4: the signing key, 0 = VCEK, 1 = VLEK
    0x050   64    report data
    0x090   48    measurement at launch
    0x180   8     reported TCB: one byte a version, in an order of the product's
    0x1a0   64    chip id
    0x2a0   512   signature of everything before it: r (72), s (72), both little-endian, then zeros
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from veiltune.errors import AttestationError
from veiltune.tee.attestation.policy import SnpTerms
from veiltune.tee.attestation.snp_certificates import ARK_PINS, Chain, ChipKey, verify_chain
from veiltune.tee.attestation.verdict import Verified

REPORT_BYTES: Final = 1184
SIGNED_BYTES: Final = 0x2A0
VERSIONS: Final = range(2, 6)
TCB_BYTES: Final[Mapping[str, Mapping[str, int]]] = {
    "Milan": {"boot_loader": 0, "tee": 1, "snp": 6, "microcode": 7},
    "Genoa": {"boot_loader": 0, "tee": 1, "snp": 6, "microcode": 7},
    "Turin": {"fmc": 0, "boot_loader": 1, "tee": 2, "snp": 3, "microcode": 7},
}
_SCALAR_BYTES: Final = 72
_ECDSA_P384_SHA384: Final = 1
_MIGRATION, _DEBUG = 1 << 18, 1 << 19
_ALTERED: Final = "it was altered on the way, or belongs to another chip: ask again"


@dataclass(frozen=True, slots=True)
class SnpEvidence:
    """A report and the certificates behind its signature.

    Attributes:
        report: 1184 bytes, as the firmware gave them.
        chain: VCEK, ASK and ARK. Where they come from does not matter: the ARK is pinned.
    """

    report: bytes
    chain: Chain


@dataclass(frozen=True, slots=True)
class Report:
    """The fields of a report whose signature verified.

    Attributes:
        product: whose root signed.
        guest_policy: the 64 bits that the guest was launched with.
        vmpl: the privilege level that asked, 0 the highest.
        report_data: 64 bytes.
        measurement: 48 bytes, hex.
        tcb: reported firmware versions by name.
        chip_id: 64 bytes, hex.
    """

    product: str
    guest_policy: int
    vmpl: int
    report_data: bytes
    measurement: str
    tcb: dict[str, int]
    chip_id: str


def verify_snp(
    evidence: SnpEvidence,
    terms: SnpTerms,
    report_data: bytes,
    now: int,
    *,
    pins_for_tests: Mapping[str, str] | None = None,
) -> Verified:
    """Verify a report under one table of the policy.

    Args:
        evidence: report and certificates.
        terms: what is accepted.
        report_data: the 64 bytes it has to be made for.
        now: Unix time in seconds.
        pins_for_tests: other roots than AMD's. Nothing but a test gives them.

    Raises:
        AttestationError: the report is not genuine, not current, or not what the terms accept.
    """
    report = authentic_report(evidence, now, ARK_PINS if pins_for_tests is None else pins_for_tests)
    if report.guest_policy & _DEBUG:
        raise AttestationError(
            "a debug guest: whoever runs it can read it",
            hint="launch it with debugging off in its policy; no policy of ours accepts a debug guest",
        )
    if report.guest_policy & _MIGRATION:
        raise AttestationError(
            "a guest with a migration agent, which can read it",
            hint="launch it without a migration agent in its policy",
        )
    if report.report_data != report_data:
        raise AttestationError(
            "the report is for other runtime data", hint="it may be a replay: ask for fresh evidence"
        )
    _check_terms(report, terms)
    return Verified(
        tee="snp",
        measurement=report.measurement,
        tcb=", ".join(f"{name} {version}" for name, version in report.tcb.items()),
        platform=f"{report.product}, chip {report.chip_id[:16]}",
    )


def authentic_report(evidence: SnpEvidence, now: int, pins: Mapping[str, str] = ARK_PINS) -> Report:
    """The report, if a chip of AMD's signed it. Whether it says anything acceptable is :func:`verify_snp`'s to check.

    Raises:
        AttestationError: another length, version or algorithm, a bad chain or signature, or another chip or TCB.
    """
    raw = evidence.report
    if len(raw) != REPORT_BYTES:
        raise AttestationError(
            f"an SEV-SNP report of {len(raw)} bytes", hint=f"it has {REPORT_BYTES}, nothing after them"
        )
    version, guest_policy = struct.unpack_from("<I4xQ", raw)
    vmpl, algorithm = struct.unpack_from("<II", raw, 0x30)
    if version not in VERSIONS or algorithm != _ECDSA_P384_SHA384:
        raise AttestationError(
            f"an SEV-SNP report of version {version} with algorithm {algorithm}", hint="versions 2–5 with algorithm 1"
        )
    signing_key = struct.unpack_from("<I", raw, 0x48)[0] >> 2 & 0b111
    if signing_key:
        name = "a VLEK" if signing_key == 1 else f"key {signing_key}"
        raise AttestationError(f"the report is signed by {name}", hint="have it signed by the chip's own key (VCEK)")
    chip = verify_chain(evidence.chain, now, pins)
    _check_signature(raw, chip.key)
    tcb = {name: raw[0x180 + at] for name, at in TCB_BYTES[chip.product].items()}
    _check_chip(raw, tcb, chip)
    return Report(
        product=chip.product,
        guest_policy=guest_policy,
        vmpl=vmpl,
        report_data=raw[0x50:0x90],
        measurement=raw[0x90:0xC0].hex(),
        tcb=tcb,
        chip_id=raw[0x1A0:0x1E0].hex(),
    )


def _check_signature(raw: bytes, key: ec.EllipticCurvePublicKey) -> None:
    r, s, padding = (
        raw[SIGNED_BYTES : SIGNED_BYTES + _SCALAR_BYTES],
        raw[SIGNED_BYTES + _SCALAR_BYTES : SIGNED_BYTES + 2 * _SCALAR_BYTES],
        raw[SIGNED_BYTES + 2 * _SCALAR_BYTES :],
    )
    signature = encode_dss_signature(int.from_bytes(r, "little"), int.from_bytes(s, "little"))
    try:
        key.verify(signature, raw[:SIGNED_BYTES], ec.ECDSA(SHA384()))
    except InvalidSignature:
        raise AttestationError("the report's signature does not verify", hint=_ALTERED) from None
    if any(padding):
        raise AttestationError("bytes follow the report's signature", hint=_ALTERED)


def _check_chip(raw: bytes, tcb: Mapping[str, int], chip: ChipKey) -> None:
    if tcb != chip.tcb:
        raise AttestationError(
            f"the report is of the TCB {dict(tcb)}, the VCEK of {chip.tcb}", hint="fetch the VCEK of the reported TCB"
        )
    if raw[0x1A0 : 0x1A0 + len(chip.hwid)] != chip.hwid:
        raise AttestationError("the report is of another chip than the VCEK", hint="fetch the VCEK of this chip")


def _check_terms(report: Report, terms: SnpTerms) -> None:
    if report.product != terms.product:
        raise AttestationError(f"a {report.product}, not a {terms.product}", hint="add a table for it to the policy")
    if report.vmpl not in terms.vmpl:
        raise AttestationError(
            f"VMPL {report.vmpl} is not accepted", hint=f"the policy accepts {', '.join(map(str, terms.vmpl))}"
        )
    for name, version in report.tcb.items():
        least = getattr(terms.min_tcb, name)
        if version < least:
            raise AttestationError(
                f"the platform's {name} has version {version}, older than {least}",
                hint="update the platform's firmware",
            )
    if report.measurement not in terms.measurements:
        raise AttestationError(
            f"measurement {report.measurement} is not accepted",
            hint="if that build is meant, add it to measurements in the policy",
        )
