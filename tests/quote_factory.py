"""An Intel of the tests' own: root, PCK certificate, revocation lists and collateral, and SGX and TDX quotes made with it."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

NOW = 1_780_000_000
WHEN = datetime.fromtimestamp(NOW, UTC)
FMSPC = "00a067110000"
VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
SVN = 7  # of every component of this platform
TD_QE_SIGNER, QE_SIGNER = "d1" * 32, "c1" * 32


def tlv(tag: int, *parts: bytes) -> bytes:
    """DER."""
    body = b"".join(parts)
    length = bytes([len(body)]) if len(body) < 128 else b"\x82" + struct.pack(">H", len(body))
    return bytes([tag]) + length + body


def oid(suffix: str) -> bytes:
    """Intel's extension and what is within it. All parts are below 128, but for the prefix."""
    return tlv(0x06, bytes.fromhex("2a864886f84d010d01"), bytes(int(part) for part in suffix.split(".") if part))


def pair(suffix: str, value: bytes) -> bytes:
    return tlv(0x30, oid(suffix), value)


def sgx_extension() -> bytes:
    components = [pair(f"2.{index}", tlv(0x02, bytes([SVN]))) for index in range(1, 18)]
    tcb = tlv(0x30, *components, pair("2.18", tlv(0x04, bytes([SVN] * 16))))
    return tlv(
        0x30,
        pair("1", tlv(0x04, bytes(16))),
        pair("2", tcb),
        pair("3", tlv(0x04, bytes(2))),
        pair("4", tlv(0x04, bytes.fromhex(FMSPC))),
        pair("5", tlv(0x0A, b"\x00")),
    )


def raw_signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]


def named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def certificate(
    name: str, key: Any, issuer: str, issuer_key: Any, *, ca: bool, extension: bytes = b""
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(WHEN - timedelta(days=100))
        .not_valid_after(WHEN + timedelta(days=1000))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False), critical=True)
    )
    if extension:
        value = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.840.113741.1.13.1"), extension)
        builder = builder.add_extension(value, critical=False)
    return builder.sign(issuer_key, SHA256())


def revocations(issuer: str, key: Any, revoked: tuple[int, ...] = ()) -> str:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(named(issuer))
        .last_update(WHEN - timedelta(days=3))
        .next_update(WHEN + timedelta(days=27))
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(WHEN - timedelta(days=4)).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(key, SHA256()).public_bytes(Encoding.DER).hex()


def pem(*certificates: x509.Certificate) -> str:
    return "".join(each.public_bytes(Encoding.PEM).decode() for each in certificates)


@dataclass
class Intel:
    """Keys and certificates; every quote and collateral of one of these belongs to one platform."""

    keys: dict[str, ec.EllipticCurvePrivateKey] = field(
        default_factory=lambda: {
            name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "ca", "tcb", "pck", "ak")
        }
    )

    def __post_init__(self) -> None:
        root = self.keys["root"]
        self.root = certificate("Intel SGX Root CA", root, "Intel SGX Root CA", root, ca=True)
        self.ca = certificate("Intel SGX PCK Processor CA", self.keys["ca"], "Intel SGX Root CA", root, ca=True)
        self.tcb = certificate("Intel SGX TCB Signing", self.keys["tcb"], "Intel SGX Root CA", root, ca=False)
        self.pck = certificate(
            *("Intel SGX PCK Certificate", self.keys["pck"], "Intel SGX PCK Processor CA", self.keys["ca"]),
            ca=False,
            extension=sgx_extension(),
        )

    @property
    def root_der(self) -> bytes:
        return self.root.public_bytes(Encoding.DER)

    def collateral(self, tee: str, *, status: str = "UpToDate", needs: int = SVN, revoked: bool = False) -> str:
        """JSON; with ``needs`` above `SVN` the platform falls to an older level, which is out of date."""
        dates = {"issueDate": f"{WHEN - timedelta(days=2):%FT%TZ}", "nextUpdate": f"{WHEN + timedelta(days=28):%FT%TZ}"}
        common = {**dates, "tcbEvaluationDataNumber": 17}
        levels = [self._level(tee, needs, status), self._level(tee, 1, "OutOfDate")]
        tcb_info = {"id": tee.upper(), "version": 3, **common, "fmspc": FMSPC, "pceId": "0000", "tcbType": 0}
        if tee == "tdx":
            module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
            module_level = {"tcb": {"isvsvn": 1}, "tcbDate": "2025-01-01T00:00:00Z", "tcbStatus": "UpToDate"}
            tcb_info |= {
                "tdxModule": module,
                "tdxModuleIdentities": [{"id": "TDX_01", **module, "tcbLevels": [module_level]}],
            }
        identity = {
            "id": "QE" if tee == "sgx" else "TD_QE",
            "version": 2,
            **common,
            "miscselect": "00" * 4,
            "miscselectMask": "FF" * 4,
            "attributes": "11" + "00" * 15,
            "attributesMask": "FB" + "FF" * 7 + "00" * 8,
            "mrsigner": QE_SIGNER if tee == "sgx" else TD_QE_SIGNER,
            "isvprodid": 1,
            "tcbLevels": [{"tcb": {"isvsvn": 5}, "tcbDate": "2025-01-01T00:00:00Z", "tcbStatus": "UpToDate"}],
        }
        texts = {"tcb_info": json.dumps({**tcb_info, "tcbLevels": levels}), "qe_identity": json.dumps(identity)}
        signatures = {
            f"{name}_signature": raw_signature(self.keys["tcb"], text.encode()).hex() for name, text in texts.items()
        }
        chain = pem(self.tcb, self.root)
        return json.dumps(
            {
                "pck_crl_issuer_chain": pem(self.ca, self.root),
                "root_ca_crl": revocations("Intel SGX Root CA", self.keys["root"]),
                "pck_crl": revocations(
                    *("Intel SGX PCK Processor CA", self.keys["ca"]), (self.pck.serial_number,) if revoked else ()
                ),
                "tcb_info_issuer_chain": chain,
                "qe_identity_issuer_chain": chain,
                **texts,
                **signatures,
            }
        )

    @staticmethod
    def _level(tee: str, svn: int, status: str) -> dict[str, Any]:
        tcb: dict[str, Any] = {"sgxtcbcomponents": [{"svn": svn}] * 16, "pcesvn": svn}
        if tee == "tdx":
            tcb["tdxtcbcomponents"] = [{"svn": svn if index == 0 else 0} for index in range(16)]
        return {"tcb": tcb, "tcbDate": "2025-01-01T00:00:00Z", "tcbStatus": status}

    def sgx(self, report_data: bytes, *, mr_enclave: bytes, attributes: int = 0x05, inside: bytes = b"") -> bytes:
        """A quote of version 3, with ``inside`` after the last of its signature data."""
        header = struct.pack("<HHIHH", 3, 2, 0, 8, SVN) + VENDOR + bytes(20)
        return self._signed(
            header + enclave_report(report_data, mr_enclave, "5a" * 32, attributes, 3), QE_SIGNER, inside
        )

    def tdx(
        self,
        report_data: bytes,
        *,
        mr_td: bytes,
        attributes: int = 1 << 28,
        rtmr: bytes = b"\x0b" * 48,
        seam_signer: bytes = bytes(48),
    ) -> bytes:
        """A quote of version 4; its four run-time registers are alike."""
        header = struct.pack("<HHIHH", 4, 2, 0x81, 0, 0) + VENDOR + bytes(20)
        body = bytes([SVN, 1]) + bytes(14) + b"\xee" * 48 + seam_signer + bytes(8)
        body += (
            struct.pack("<Q", attributes)
            + bytes.fromhex("e702060000000000")
            + mr_td
            + bytes(3 * 48)
            + 4 * rtmr
            + report_data
        )
        return self._signed(header + body, TD_QE_SIGNER, b"", wrapped=True)

    def _signed(self, signed: bytes, qe_signer: str, inside: bytes, *, wrapped: bool = False) -> bytes:
        qe_data = bytes(range(32))
        binding = hashlib.sha256(point(self.keys["ak"]) + qe_data).digest() + bytes(32)
        qe_report = enclave_report(binding, b"\x96" * 32, qe_signer, 0x15, 5, product=1)
        chain = pem(self.pck, self.ca, self.root).encode() + b"\x00"
        rest = qe_report + raw_signature(self.keys["pck"], qe_report)
        rest += struct.pack("<H", len(qe_data)) + qe_data + struct.pack("<HI", 5, len(chain)) + chain + inside
        if wrapped:
            rest = struct.pack("<HI", 6, len(rest)) + rest
        data = raw_signature(self.keys["ak"], signed) + point(self.keys["ak"]) + rest
        return signed + struct.pack("<I", len(data)) + data


def enclave_report(
    report_data: bytes, mr_enclave: bytes, mr_signer: str, attributes: int, svn: int, product: int = 0
) -> bytes:
    flags = struct.pack("<QQ", attributes, 0xE7)
    body = bytes([SVN] * 16) + bytes(32) + flags + mr_enclave + bytes(32) + bytes.fromhex(mr_signer) + bytes(96)
    return body + struct.pack("<HH", product, svn) + bytes(60) + report_data
