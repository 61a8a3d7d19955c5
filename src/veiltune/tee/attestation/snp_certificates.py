"""AMD's certificates behind an SEV-SNP report: root key (ARK), signing key (ASK), and the chip's own (VCEK).

The ARK is pinned by the SHA-256 of its SubjectPublicKeyInfo, one for each product. Each of the three is signed by the
one above with RSA-4096-PSS and SHA-384, the ARK by itself, and each is within its dates. The VCEK says in extensions
for which chip and for which firmware versions it was made.

*Reference*: AMD, "Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface Specification", 57230, §3.

*Limits*: AMD's revocation lists are not consulted.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, NamedTuple, cast

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from veiltune.errors import AttestationError
from veiltune.tee.attestation.certificates import BadCertificateError, refusing

MAX_CERTIFICATE_BYTES: Final = 4096
ARK_PINS: Final[Mapping[str, str]] = {
    "Milan": "9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9",
    "Genoa": "429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831",
    "Turin": "4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08",
}
_AMD: Final = "1.3.6.1.4.1.3704.1."
_HWID: Final = _AMD + "4"
_TCB_OIDS: Final = {"boot_loader": "3.1", "tee": "3.2", "snp": "3.3", "microcode": "3.8", "fmc": "3.9"}
_HINT: Final = "fetch the chain for this chip and its reported TCB from AMD's key distribution service"


class Chain(NamedTuple):
    """The three certificates, DER."""

    vcek: bytes
    ask: bytes
    ark: bytes


class ChipKey(NamedTuple):
    """What a verified chain says.

    Attributes:
        product: whose root it is.
        key: of the chip, P-384.
        hwid: the chip's identity, 64 bytes; Turin's have 8.
        tcb: the firmware versions that the key was derived for.
    """

    product: str
    key: ec.EllipticCurvePublicKey
    hwid: bytes
    tcb: dict[str, int]


def verify_chain(chain: Chain, now: int, pins: Mapping[str, str] = ARK_PINS) -> ChipKey:
    """Verify the chain up to a pinned root.

    Args:
        chain: the certificates.
        now: Unix time in seconds.
        pins: SHA-256 (hex) of the roots' SubjectPublicKeyInfo by product. Nothing but a test gives others than AMD's.

    Raises:
        AttestationError: a certificate that is malformed, out of its dates, of another kind, or not signed as it should.
    """
    vcek, ask, ark = (_load(name, der) for name, der in zip(("VCEK", "ASK", "ARK"), chain, strict=True))
    product = product_of(chain, pins)
    if product is None:
        raise AttestationError(
            f"the root key {hashlib.sha256(_spki(ark)).hexdigest()} is none of AMD's ({', '.join(pins)})",
            hint="evidence of this product is not accepted",
        )
    for name, certificate, issuer, common_name in (
        ("ARK", ark, ark, f"ARK-{product}"),
        ("ASK", ask, ark, f"SEV-{product}"),
        ("VCEK", vcek, ask, "SEV-VCEK"),
    ):
        _check_dates(name, certificate, now)
        _check_name(name, certificate, common_name)
        _check_signature(name, certificate, issuer)
    return _chip_key(vcek, product)


def product_of(chain: Chain, pins: Mapping[str, str] = ARK_PINS) -> str | None:
    """Whose pinned root the chain ends in, if in any; no signature of it is looked at.

    Raises:
        AttestationError: the root cannot be read.
    """
    found = hashlib.sha256(_spki(_load("ARK", chain.ark))).hexdigest()
    return next((name for name, pin in pins.items() if pin == found), None)


def _load(name: str, der: bytes) -> x509.Certificate:
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise AttestationError(f"a {name} of {len(der)} bytes", hint=f"at most {MAX_CERTIFICATE_BYTES} bytes are read")
    try:
        with refusing():
            certificate = x509.load_der_x509_certificate(der)
            body, signature = certificate.tbs_certificate_bytes, certificate.signature
    except BadCertificateError:
        raise AttestationError(f"the {name} is not a certificate (DER)", hint=_HINT) from None
    # The signature covers the body alone: what follows it has to be the algorithm again as the body names it, and itself.
    tail = struct.pack(">BBHB", 0x03, 0x82, len(signature) + 1, 0) + signature  # DER: a bit string without odd bits
    if not der.endswith(tail) or der[der.find(body) + len(body) : -len(tail)] not in body:
        raise AttestationError(f"the {name} does not end in the signature that it names", hint=_HINT)
    return certificate


def _spki(certificate: x509.Certificate) -> bytes:
    try:
        with refusing():
            return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except BadCertificateError:  # an unsupported key: no pin's
        return b""


def _check_dates(name: str, certificate: x509.Certificate, now: int) -> None:
    try:
        time = datetime.fromtimestamp(now, UTC)
    except (ValueError, OverflowError, OSError):
        raise AttestationError(
            f"the time {now} is no Unix time in seconds", hint="check this machine's clock"
        ) from None
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= time <= last:
        raise AttestationError(
            f"the {name} is valid from {first:%Y-%m-%d} to {last:%Y-%m-%d}, not on {time:%Y-%m-%d}",
            hint="check this machine's clock; " + _HINT,
        )


def _check_name(name: str, certificate: x509.Certificate, wanted: str) -> None:
    try:
        with refusing():
            found = [str(each.value) for each in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except BadCertificateError:
        found = [""]
    if found == ["SEV-VLEK"] or (name == "ASK" and found == [wanted.replace("SEV-", "SEV-VLEK-")]):
        raise AttestationError("the report is signed by a VLEK", hint="have it signed by the chip's own key (VCEK)")
    if found != [wanted]:
        raise AttestationError(f"the {name} is named {', '.join(found)[:80]!r}, not {wanted!r}", hint=_HINT)


def _check_signature(name: str, certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    try:
        with refusing():
            key = issuer.public_key()
            if not isinstance(key, rsa.RSAPublicKey) or key.key_size != 4096:
                raise AttestationError(f"the {name} is not signed by an RSA key of 4096 bits", hint=_HINT)
            pss_named = certificate.signature_algorithm_oid == SignatureAlgorithmOID.RSASSA_PSS
            if not pss_named or certificate.issuer != issuer.subject:
                raise AttestationError(f"the {name} does not name the certificate above it, or RSA-PSS", hint=_HINT)
            pss = padding.PSS(padding.MGF1(SHA384()), SHA384.digest_size)
            key.verify(certificate.signature, certificate.tbs_certificate_bytes, pss, SHA384())
    except BadCertificateError:
        raise AttestationError(f"the signature of the {name} does not verify", hint=_HINT) from None


def _chip_key(vcek: x509.Certificate, product: str) -> ChipKey:
    try:
        with refusing():
            key = vcek.public_key()
    except BadCertificateError:
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise AttestationError("the VCEK's key is not on P-384", hint=_HINT)
    names = [name for name in _TCB_OIDS if name != "fmc" or product == "Turin"]
    tcb = {name: _der_integer(_extension(vcek, _AMD + _TCB_OIDS[name])) for name in names}
    hwid, size = _extension(vcek, _HWID), 8 if product == "Turin" else 64
    if len(hwid) == size + 2 and hwid[:2] == bytes((0x04, size)):  # some are wrapped as an octet string once more
        hwid = hwid[2:]
    if len(hwid) != size:
        raise AttestationError(f"the VCEK names a chip by {len(hwid)} bytes, not {size}", hint=_HINT)
    return ChipKey(product, key, hwid, tcb)


def _extension(vcek: x509.Certificate, oid: str) -> bytes:
    try:
        with refusing():
            extension = vcek.extensions.get_extension_for_oid(x509.ObjectIdentifier(oid))
    except BadCertificateError:
        raise AttestationError(f"the VCEK lacks the extension {oid}", hint=_HINT) from None
    return cast(x509.UnrecognizedExtension, extension.value).value


def _der_integer(der: bytes) -> int:
    """A DER INTEGER from 0 to 255."""
    if not (der[:2] == b"\x02\x01" and len(der) == 3 and der[2] < 128) and not (
        der[:3] == b"\x02\x02\x00" and len(der) == 4 and der[3] >= 128
    ):
        raise AttestationError(f"the VCEK has a firmware version {der[:8].hex()}", hint="it is a number of one byte")
    return der[-1]
