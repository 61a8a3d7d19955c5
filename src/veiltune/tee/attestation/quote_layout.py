"""The bytes of an SGX or TDX quote: where each part stands, and that there is nothing else.

The verifying library reads a quote from its front and ignores what follows, so lengths are checked here: every length
field has to lead exactly to the end of what holds it.

*Reference*: Intel SGX ECDSA Quote Library Reference (version 3 quotes) and Intel TDX DCAP Quoting Library API
(versions 4 and 5), appendices on the quote's structure. Little-endian::

    offset  size
    0       48    header: version, key type, TEE type, …; 2 bytes each, then the TEE type of 4
    48      …     version 5 only: the body's type (2) and size (4)
    …       …     body: an SGX enclave report (384) or a TD report (584, 648 or longer)
    …       4     size of the signature data, which ends the quote:
                  ECDSA signature (64), attestation key (64),
                  version 4 and later: type 6 (2) and the size of the rest (4),
                  QE report (384), its signature (64), QE authentication data (size of 2 and that many),
                  type 5 (2) and size (4) of the certificates (PEM: PCK, intermediate, root; then perhaps a NUL)
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final, NamedTuple, TypeGuard

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from veiltune.errors import AttestationError
from veiltune.tee.attestation.certificates import BadCertificateError, refusing

MAX_QUOTE_BYTES: Final = 16384
TEE_NAMES: Final = {0x00: "sgx", 0x81: "tdx"}
_HEADER_BYTES: Final = 48
_BODY_BYTES: Final = {0x00: 384, 0x81: 584}
_SIGNATURE_AND_KEY_BYTES: Final = 128
_QE_REPORT_AND_SIGNATURE_BYTES: Final = 448
_QE_REPORT_CERTIFICATION: Final = 6
_PCK_CHAIN_CERTIFICATION: Final = 5
_HINT: Final = "send the quote exactly as the hardware gave it"


class Layout(NamedTuple):
    """Of one quote.

    Attributes:
        tee: ``sgx`` or ``tdx``.
        body: offset of the report in the quote.
        signature: offset of the signature, after the size of the signature data.
        certificates: offset of the PEM text.
        end: number of bytes of the quote, padding not counted.
    """

    tee: str
    body: int
    signature: int
    certificates: int
    end: int


def layout_of(quote: bytes) -> Layout:
    """Where the parts of ``quote`` are; bytes after its end are not looked at.

    Raises:
        AttestationError: an unknown version or kind, a cut quote, or a length that does not fit what holds it.
    """
    try:
        return _walk(quote)
    except struct.error:
        raise AttestationError(f"a quote of {len(quote)} bytes is cut short", hint=_HINT) from None


def require_exact(quote: bytes) -> Layout:
    """:func:`layout_of` a quote that ends where it says.

    Raises:
        AttestationError: as there; too long a quote, or bytes after its end.
    """
    if len(quote) > MAX_QUOTE_BYTES:
        raise AttestationError(f"a quote of {len(quote)} bytes", hint=f"at most {MAX_QUOTE_BYTES} bytes are read")
    layout = layout_of(quote)
    if len(quote) != layout.end:
        raise AttestationError(f"{len(quote) - layout.end} bytes follow the end of the quote", hint=_HINT)
    return layout


def without_padding(quote: bytes) -> bytes:
    """``quote`` without the zero bytes that some drivers append; any other bytes after its end are kept, and refused."""
    end = layout_of(quote).end
    return quote if any(quote[end:]) else quote[:end]


def require_root(quote: bytes, layout: Layout, root_key_id: bytes) -> None:
    """The quote's own chain is three certificates and no other text; the last is the very root that was verified against.

    The verifying library trusts its pinned root and never reads the copy in the quote; without this check it could be
    anything. White space is free, as in all PEM.

    Args:
        quote: verified otherwise.
        layout: of it.
        root_key_id: SHA-384 of the pinned root's public point.

    Raises:
        AttestationError: another number of certificates, another root, or other text.
    """
    text = quote[layout.certificates :]
    try:
        with refusing():
            chain = x509.load_pem_x509_certificates(text)
            key = chain[-1].public_key()
            chain[-1].verify_directly_issued_by(chain[-1])
    except BadCertificateError:
        raise AttestationError(
            "the quote's certificates cannot be read, or its root is not genuine", hint=_HINT
        ) from None
    point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint) if _is_p256(key) else b""
    if len(chain) != 3 or hashlib.sha384(point).digest() != root_key_id:
        raise AttestationError(
            f"the quote has {len(chain)} certificates, and they do not end in the pinned root", hint=_HINT
        )
    if _squeezed(text) != _squeezed(b"".join(each.public_bytes(Encoding.PEM) for each in chain)):
        raise AttestationError("the quote has other text among its certificates", hint=_HINT)


def _squeezed(pem: bytes) -> bytes:
    return b"".join(pem.removesuffix(b"\x00").split())


def _is_p256(key: object) -> TypeGuard[ec.EllipticCurvePublicKey]:
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def _walk(quote: bytes) -> Layout:
    version, _, tee_type = struct.unpack_from("<HHI", quote)
    if version not in {3, 4, 5} or tee_type not in TEE_NAMES or (version == 3 and tee_type != 0):
        raise AttestationError(
            f"a quote of version {version} and TEE type {tee_type:#x}", hint="SGX or TDX, versions 3–5"
        )
    body = _HEADER_BYTES + (6 if version == 5 else 0)
    size = struct.unpack_from("<HI", quote, _HEADER_BYTES)[1] if version == 5 else _BODY_BYTES[tee_type]
    signature = body + size + 4
    (signature_bytes,) = struct.unpack_from("<I", quote, signature - 4)
    end = signature + signature_bytes
    at = signature + _SIGNATURE_AND_KEY_BYTES
    if version > 3:
        at = _certification(quote, at, _QE_REPORT_CERTIFICATION, end)
    at += _QE_REPORT_AND_SIGNATURE_BYTES
    at += 2 + struct.unpack_from("<H", quote, at)[0]
    certificates = _certification(quote, at, _PCK_CHAIN_CERTIFICATION, end)
    struct.unpack_from(f"{signature_bytes}x", quote, signature)
    return Layout(TEE_NAMES[tee_type], body, signature, certificates, end)


def _certification(quote: bytes, at: int, wanted: int, end: int) -> int:
    """The offset of the data whose type and size stand at ``at``; its type is ``wanted`` and it goes up to ``end``."""
    kind, size = struct.unpack_from("<HI", quote, at)
    if kind != wanted:
        raise AttestationError(f"certification data of type {kind} in the quote", hint=f"type {wanted} is supported")
    if at + 6 + size != end:
        raise AttestationError("the lengths in the quote contradict one another", hint=_HINT)
    return at + 6
