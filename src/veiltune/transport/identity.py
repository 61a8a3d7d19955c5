"""A party's identity: one P-256 key, a certificate that it signs itself, and the public name of the key.

What names a party to others is its *pin*, ``spki-sha256:`` and the SHA-256 of the key's SubjectPublicKeyInfo. The
certificate only carries the key into TLS and bounds how long it is used: no authority stands behind it, and its subject
authorises nothing. P-256 because every TLS stack takes it, gRPC's included.

The private file holds the key (PKCS #8) and the certificate as PEM, and is refused if anybody but its owner may read it.
The certificate begins a day before it is made, for peers whose clocks are behind.
"""

from __future__ import annotations

import hashlib
import os
import ssl
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from veiltune.errors import ConfigError, ProtocolError
from veiltune.peers import PIN_PREFIX, PeerConfig
from veiltune.secrets import Secret

VALID_DAYS: Final = 730
BACK_DATED: Final = timedelta(days=1)
MAX_CERTIFICATE_BYTES: Final = 4096
_MAX_FILE_BYTES: Final = 1 << 16
_ORGANISATION: Final = "veiltune"


@final
class IdentityKey(Secret):
    """A P-256 private key.

    Args:
        key: the key itself, or None for a fresh one.
    """

    __slots__ = ("__key",)

    def __init__(self, key: ec.EllipticCurvePrivateKey | None = None) -> None:
        self.__key = ec.generate_private_key(ec.SECP256R1()) if key is None else key

    @property
    def pin(self) -> str:
        """The public name of the key."""
        return pin_of(self.__key.public_key())

    def certify(self, role: str, days: int, now: datetime) -> x509.Certificate:
        """A certificate for this key, signed with it, from a day before ``now`` to ``days`` after it."""
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANISATION),
                x509.NameAttribute(NameOID.COMMON_NAME, role),
            ]
        )
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.__key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACK_DATED)
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=False)
            .sign(self.__key, hashes.SHA256())
        )

    def reveal(self) -> bytes:
        """The key as unencrypted PEM. Every call of this is a place to audit."""
        return self._pem(serialization.NoEncryption())

    def load_into(self, context: ssl.SSLContext, certificate: x509.Certificate) -> None:
        """Give key and certificate to a TLS context, which takes them from a named file only.

        The file is memory without a place in any file system; where there is no such thing, it is encrypted under a
        password that is forgotten at once.
        """
        public = certificate.public_bytes(serialization.Encoding.PEM)
        if hasattr(os, "memfd_create"):
            with _in_memory(self.reveal() + public) as path:
                context.load_cert_chain(path)
            return
        password = os.urandom(32).hex()
        with tempfile.NamedTemporaryFile(prefix="veiltune-") as file:
            file.write(self._pem(serialization.BestAvailableEncryption(password.encode())) + public)
            file.flush()
            context.load_cert_chain(file.name, password=password)

    def _pem(self, encryption: serialization.KeySerializationEncryption) -> bytes:
        return self.__key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)

    def _describe(self) -> str:
        return f"IdentityKey {self.pin}"


@dataclass(frozen=True, slots=True)
class Identity:
    """A party's key, with the certificate that carries it.

    Attributes:
        role: which party.
        key: its private key.
        certificate: for that key, signed with it.
    """

    role: str
    key: IdentityKey
    certificate: x509.Certificate

    @property
    def pin(self) -> str:
        """The public name of its key."""
        return self.key.pin

    def public_text(self) -> str:
        """What to hand to the peers: the entry for their configurations, in TOML."""
        return f'[[peers]]\nrole = "{self.role}"\nkey = "{self.pin}"\n'


def pin_of(public_key: ec.EllipticCurvePublicKey) -> str:
    """The public name of a key."""
    spki = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return PIN_PREFIX + hashlib.sha256(spki).hexdigest()


def new_identity(role: str, *, days: int = VALID_DAYS, now: datetime | None = None) -> Identity:
    """An identity in memory alone: what an enclave makes at its start. ``days``: how long its certificate holds."""
    key = IdentityKey()
    return Identity(role, key, key.certify(role, days, now or datetime.now(UTC)))


def private_file(directory: Path, role: str) -> Path:
    """Where `make_identity` keeps a role's private key."""
    return directory / f"{role}.key"


def make_identity(directory: Path, role: str, *, days: int = VALID_DAYS, now: datetime | None = None) -> Identity:
    """What `veiltune keygen` does: ``ROLE.key``, for its owner's eyes only, and ``ROLE.peer.toml``, to hand to the peers.

    Raises:
        ConfigError: no such role or time, a key is there already, or the directory cannot be written to.
    """
    _check_request(role, days)
    identity = new_identity(role, days=days, now=now)
    _write(directory, identity, replace=False)
    return identity


def renew_identity(directory: Path, role: str, *, days: int = VALID_DAYS, now: datetime | None = None) -> Identity:
    """A new certificate for the key that is there. Its pin stays, so the peers need not be told.

    Raises:
        ConfigError: no such role or time, no key is there, or its file is refused.
    """
    _check_request(role, days)
    key = _read(private_file(directory, role)).key
    identity = Identity(role, key, key.certify(role, days, now or datetime.now(UTC)))
    _write(directory, identity, replace=True)
    return identity


def load_identity(path: Path, *, now: datetime | None = None) -> Identity:
    """An identity from its private file.

    Raises:
        ConfigError: no file, others may read it, it is damaged, or its certificate is not valid now.
    """
    identity = _read(path)
    if fault := out_of_date(identity.certificate, now or datetime.now(UTC)):
        raise ConfigError(
            f"{path}: its certificate {fault}",
            hint=f"set the clock, or run `veiltune keygen {identity.role} --to {path.parent} --renew`: the key stays",
        )
    return identity


def out_of_date(certificate: x509.Certificate, now: datetime) -> str | None:
    """What is wrong with a certificate's time, in words that follow "its certificate"; None if nothing is."""
    clock = f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC"
    if now < certificate.not_valid_before_utc:
        return f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; {clock}"
    if now > certificate.not_valid_after_utc:
        return f"expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; {clock}"
    return None


_UNREADABLE: Final = (
    *(ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature),
    *(x509.InvalidVersion, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
)


def read_certificate(der: bytes) -> tuple[x509.Certificate, str]:
    """A certificate that a stranger sent, and the pin of its key. Nothing is known yet but that its own key signed it.

    Raises:
        ProtocolError: it is no certificate of a P-256 key that signed it.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        return certificate, _check_certificate(certificate)
    except (*_UNREADABLE, Warning) as error:
        # Odd but parsable certificates only warn, which a process may have made an error.
        raise ProtocolError(f"its certificate is malformed ({type(error).__name__})") from None


def _check_certificate(certificate: x509.Certificate) -> str:
    public_key = certificate.public_key()
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, ec.SECP256R1):
        raise TypeError("not a P-256 key")
    certificate.verify_directly_issued_by(certificate)
    return pin_of(public_key)


# --- files ------------------------------------------------------------------------------------------------------------


def _check_request(role: str, days: int) -> None:
    try:
        PeerConfig(role=role, key=PIN_PREFIX + 64 * "0")
    except ValueError:
        raise ConfigError(
            f"{role!r} is no role", hint="lower-case letters, at most 16: provider, owner, host or enclave"
        ) from None
    if not 1 <= days <= 3650:
        raise ConfigError(f"a certificate of {days} days", hint="give 1 to 3650 days")


def _read(path: Path) -> Identity:
    """The identity in a file, whatever its dates are."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            mode = stat.S_IMODE(status.st_mode)
            data = file.read(_MAX_FILE_BYTES) if stat.S_ISREG(status.st_mode) else b""
    except FileNotFoundError:
        raise ConfigError(f"no key file {str(path)!r}", hint="make one: `veiltune keygen ROLE --to DIR`") from None
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}", hint="give a key file of your own") from None
    if data and mode & 0o077:
        raise ConfigError(
            f"{path} may be read or changed by others (mode {mode:03o})",
            hint=f"run: chmod 600 {path}; if others had access to it, make a new key instead",
        )
    try:
        return _parse(data)
    except (ValueError, TypeError, IndexError, UnsupportedAlgorithm, InvalidSignature, Warning):
        raise ConfigError(
            f"{str(path)!r} holds no identity, or a damaged one", hint="restore it, or make one: `veiltune keygen`"
        ) from None


def _open_at_once(path: str, flags: int) -> int:
    """A pipe would block until somebody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _parse(pem: bytes) -> Identity:
    private, begin, public = pem.partition(b"-----BEGIN CERTIFICATE-----")
    key = serialization.load_pem_private_key(private, None)
    certificate = x509.load_pem_x509_certificate(begin + public)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("not an elliptic curve's key")
    handle = IdentityKey(key)
    if _check_certificate(certificate) != handle.pin:
        raise ValueError("the certificate is another key's")
    role = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    return Identity(str(role), handle, certificate)


def _write(directory: Path, identity: Identity, *, replace: bool) -> None:
    path = private_file(directory, identity.role)
    secret = identity.key.reveal() + identity.certificate.public_bytes(serialization.Encoding.PEM)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=f".{path.name}.") as file:  # mode 600
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
            if replace:  # at no moment without a key
                spare = path.with_name(f".{path.name}.new")
                spare.unlink(missing_ok=True)
                os.link(file.name, spare)
                spare.replace(path)
            else:
                os.link(file.name, path)  # whole or not at all, and never over another
        (directory / f"{identity.role}.peer.toml").write_text(identity.public_text(), encoding="utf-8")
    except FileExistsError:
        raise ConfigError(
            f"{str(path)!r} is there already", hint="--renew gives it a new certificate; remove it to begin anew"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}", hint="choose another directory") from None


@contextmanager
def _in_memory(content: bytes) -> Generator[str]:
    """The path of a file that exists in this process's memory alone."""
    descriptor = os.memfd_create("veiltune-identity", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{descriptor}"
