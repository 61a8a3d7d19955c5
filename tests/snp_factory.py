"""An AMD of the tests' own: ARK, ASK and VCEKs, and SEV-SNP reports signed with them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from helpers import flipped
from quote_factory import WHEN, named, tlv
from veiltune.tee.attestation.snp import SnpEvidence
from veiltune.tee.attestation.snp_certificates import Chain

PSS = padding.PSS(padding.MGF1(SHA384()), 48)
MEASUREMENT = bytes(range(1, 49))
CHIP = bytes(range(64))
TCB = {"boot_loader": 3, "tee": 1, "snp": 22, "microcode": 209}
SPL = {"boot_loader": "3.1", "tee": "3.2", "snp": "3.3", "microcode": "3.8", "fmc": "3.9"}
PLACES = {
    "Milan": {"boot_loader": 0, "tee": 1, "snp": 6, "microcode": 7},
    "Turin": {"fmc": 0, "boot_loader": 1, "tee": 2, "snp": 3, "microcode": 7},
}


@cache
def rsa_key(name: str, bits: int = 4096) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


@cache
def chip_key(name: str = "chip", curve: type[ec.EllipticCurve] = ec.SECP384R1) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve())


def integer(value: int) -> bytes:
    return tlv(0x02, bytes([value]) if value < 128 else bytes([0, value]))


def issue(
    name: str,
    key: Any,
    issuer: str,
    issuer_key: Any,
    *,
    days: int = 1000,
    extensions: dict[str, bytes] | None = None,
    scheme: tuple[Any, Any] = (SHA384(), PSS),
) -> bytes:
    """A certificate (DER) signed with RSA-PSS, or whatever ``scheme`` says."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(WHEN - timedelta(days=100))
        .not_valid_after(WHEN + timedelta(days=days))
    )
    for suffix, value in (extensions or {}).items():
        number = x509.ObjectIdentifier(f"1.3.6.1.4.1.3704.1.{suffix}")
        builder = builder.add_extension(x509.UnrecognizedExtension(number, value), critical=False)
    hash_name, rsa_padding = scheme
    return builder.sign(issuer_key, hash_name, rsa_padding=rsa_padding).public_bytes(Encoding.DER)


def with_serial_zero(der: bytes, issuer_key: rsa.RSAPrivateKey) -> bytes:
    """As AMD's are, which the builder refuses to make."""
    made = x509.load_der_x509_certificate(der)
    at = made.tbs_certificate_bytes.index(b"\x02\x01\x01")
    body = made.tbs_certificate_bytes[:at] + b"\x02\x01\x00" + made.tbs_certificate_bytes[at + 3 :]
    signature = issuer_key.sign(body, PSS, SHA384())
    return der.replace(made.tbs_certificate_bytes, body).replace(made.signature, signature)


def vcek(
    product: str = "Milan",
    *,
    tcb: dict[str, int] = TCB,
    hwid: bytes = CHIP,
    key: Any = None,
    name: str = "SEV-VCEK",
    days: int = 1000,
) -> bytes:
    extensions = {
        "2": tlv(0x16, product.encode()),
        "4": hwid,
        **{SPL[each]: integer(value) for each, value in tcb.items()},
    }
    ask = rsa_key("ask")
    made = issue(name, key or chip_key(), f"SEV-{product}", ask, days=days, extensions=extensions)
    return with_serial_zero(made, ask)


@cache
def authorities(product: str = "Milan") -> tuple[bytes, bytes]:
    """ASK and ARK."""
    ark = rsa_key("ark")
    root = issue(f"ARK-{product}", ark, f"ARK-{product}", ark)
    return issue(f"SEV-{product}", rsa_key("ask"), f"ARK-{product}", ark), root


def pins(product: str = "Milan", key: Any = None) -> dict[str, str]:
    spki = (key or rsa_key("ark")).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return {product: hashlib.sha256(spki).hexdigest()}


def report(
    report_data: bytes,
    *,
    product: str = "Milan",
    key: ec.EllipticCurvePrivateKey | None = None,
    tcb: dict[str, int] = TCB,
    chip: bytes = CHIP,
    **fields: int,
) -> bytes:
    """A signed report. ``fields``: version, guest_policy, vmpl, algorithm, signing_key."""
    raw = bytearray(0x2A0)
    struct.pack_into("<IIQ", raw, 0, fields.get("version", 3), 0, fields.get("guest_policy", 0x30000))
    struct.pack_into("<II", raw, 0x30, fields.get("vmpl", 0), fields.get("algorithm", 1))
    struct.pack_into("<I", raw, 0x48, fields.get("signing_key", 0) << 2)
    raw[0x50:0x90], raw[0x90:0xC0], raw[0x1A0:0x1E0] = report_data, MEASUREMENT, chip
    for name, at in PLACES[product].items():
        raw[0x180 + at] = tcb[name]
    r, s = decode_dss_signature((key or chip_key()).sign(bytes(raw), ec.ECDSA(SHA384())))
    return bytes(raw) + r.to_bytes(72, "little") + s.to_bytes(72, "little") + bytes(368)


@cache
def chain() -> Chain:
    return Chain(vcek(), *authorities())


def evidence(report_data: bytes, **fields: Any) -> SnpEvidence:
    return SnpEvidence(report(report_data, **fields), chain())


PKCS1 = (SHA384(), None)
SHA256_PSS = (SHA256(), padding.PSS(padding.MGF1(SHA256()), 32))


def flipped_chains(chain: Chain, step: int) -> Iterator[Chain]:
    """The chain with one bit of one certificate turned over: of every ``step``-th byte of each."""
    for index, certificate in enumerate(chain):
        for at in range(0, len(certificate), step):
            altered = list(chain)
            altered[index] = flipped(certificate, at)
            yield Chain(*altered)
