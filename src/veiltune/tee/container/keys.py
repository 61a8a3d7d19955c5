"""Who a container is sealed for: recipients by their public keys, and the keys that open.

A recipient's key is X25519. `make_recipient_key` writes two files: ``ROLE.recipient.key``, for its owner's eyes only
(PKCS #8 as PEM below a line that names the role), and ``ROLE.recipient.toml``, to hand to whoever seals. The latter is
not secret, but whoever replaces it on its way is the one who can open: compare its fingerprint by another way. An
attested enclave keeps its key in memory, and its public key comes in its evidence.
"""

from __future__ import annotations

import hashlib
import re
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from veiltune.errors import ConfigError
from veiltune.secrets import ByteSecret, Secret
from veiltune.tee.container.files import cannot_write, whole_file

KEY_BYTES: Final = 32
DIGEST_BYTES: Final = 32
SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_PREFIX: Final = "x25519:"
_ROLE: Final = re.compile("[a-z]{1,16}")
_FIRST_LINE: Final = re.compile(rb"veiltune recipient key, role ([a-z]{1,16})\n")
_MAX_FILE_BYTES: Final = 1 << 14
_MAKE: Final = "make one: `veiltune seal … --key ROLE.recipient.key`"


@final
class DataKey(ByteSecret):
    """The key of one container, fresh for it."""

    __slots__ = ()
    _purpose = "data"


@dataclass(frozen=True, slots=True)
class Recipient:
    """Whoever has the private key.

    Attributes:
        role: what it is to this project: ``enclave``, say.
        public_key: 32 bytes.
        runtime_sha256: for an attested enclave the SHA-256 of its encoded runtime data; for a key file empty.

    Raises:
        ConfigError: a field of another form.
    """

    role: str
    public_key: bytes
    runtime_sha256: bytes = b""

    def __post_init__(self) -> None:
        if not _ROLE.fullmatch(self.role):
            raise ConfigError(f"{self.role!r} is no role", hint="lower-case letters, at most 16: enclave, for example")
        if len(self.public_key) != KEY_BYTES:
            raise ConfigError(f"a recipient's key of {len(self.public_key)} bytes", hint=f"X25519 has {KEY_BYTES}")
        if len(self.runtime_sha256) not in {0, DIGEST_BYTES}:
            raise ConfigError(
                f"a digest of runtime data of {len(self.runtime_sha256)} bytes", hint=f"SHA-256 has {DIGEST_BYTES}"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the public key: what two people compare."""
        return hashlib.sha256(self.public_key).hexdigest()

    def encrypt(self, data: bytes, info: bytes) -> bytes:
        """HPKE (RFC 9180, base mode, one message) for this recipient.

        Raises:
            ConfigError: the public key is one that nobody has the private key of.
        """
        try:
            return SUITE.encrypt(data, X25519PublicKey.from_public_bytes(self.public_key), info=info)
        except ValueError:  # a point of small order
            raise ConfigError(f"the public key of the recipient {self.role!r} is not valid", hint=_MAKE) from None

    def public_text(self) -> str:
        """What `load_recipient` reads, in TOML."""
        return (
            "# A recipient of sealed containers. Public; compare the fingerprint by another way before sealing for it:\n"
            f'# {self.fingerprint}\nrole = "{self.role}"\npublic_key = "{_PREFIX}{self.public_key.hex()}"\n'
        )


@final
class RecipientKey(Secret):
    """A recipient's private key.

    Args:
        role: of the recipient.
        key: the key itself, or None for a fresh one.
        runtime_sha256: see `Recipient`.
    """

    __slots__ = ("__key", "recipient")

    def __init__(self, role: str, key: X25519PrivateKey | None = None, runtime_sha256: bytes = b"") -> None:
        self.__key = X25519PrivateKey.generate() if key is None else key
        raw = self.__key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.recipient = Recipient(role, raw, runtime_sha256)

    def bound_to(self, runtime_sha256: bytes) -> RecipientKey:
        """The same key of an enclave with other runtime data."""
        return RecipientKey(self.recipient.role, self.__key, runtime_sha256)

    def decrypt(self, data: bytes, info: bytes) -> bytes:
        """What :meth:`Recipient.encrypt` made.

        Raises:
            InvalidTag: altered, or made for another key or ``info``.
        """
        try:
            return SUITE.decrypt(data, self.__key, info=info)
        except ValueError:  # a point of small order
            raise InvalidTag from None

    def reveal(self) -> bytes:
        """The key as unencrypted PEM. Every call of this is a place to audit."""
        return self.__key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def _describe(self) -> str:
        return f"RecipientKey {self.recipient.role} {self.recipient.fingerprint[:16]}"


def make_recipient_key(directory: Path, role: str) -> Recipient:
    """Write a fresh key to ``ROLE.recipient.key`` (mode 600) and its public half to ``ROLE.recipient.toml``.

    Raises:
        ConfigError: no such role, or a key is there already.
        CheckpointError: the disk is full, or refuses.
    """
    key = RecipientKey(role)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(directory, error) from None
    with whole_file(directory / f"{role}.recipient.key", replace=False) as file:
        file.write(f"veiltune recipient key, role {role}\n".encode() + key.reveal())
    with whole_file(directory / f"{role}.recipient.toml", replace=True) as file:
        file.write(key.recipient.public_text().encode())
    return key.recipient


def load_or_make_recipient_key(path: Path, role: str) -> RecipientKey:
    """The private key in a file, which is made, with its public half beside it, if it is not there.

    Raises:
        ConfigError: see `load_recipient_key`; or a key that is not there has another name than ``ROLE.recipient.key``.
        CheckpointError: the disk is full, or refuses.
    """
    if not path.exists():
        if path.name != f"{role}.recipient.key":
            raise ConfigError(f"there is no key {str(path)!r}", hint=f"one that is to be made is {role}.recipient.key")
        make_recipient_key(path.parent, role)
    return load_recipient_key(path)


def load_recipient(path: Path) -> Recipient:
    """The recipient in a file ``ROLE.recipient.toml``.

    Raises:
        ConfigError: no file, or another content.
    """
    try:
        said: dict[str, Any] = tomllib.loads(_read(path)[0].decode())
    except ValueError:
        said = {}
    match said:
        case {"role": str(role), "public_key": str(text)} if re.fullmatch(_PREFIX + "[0-9a-f]{64}", text):
            return Recipient(role, bytes.fromhex(text.removeprefix(_PREFIX)))
    raise ConfigError(f"{str(path)!r} names no recipient", hint="give the ROLE.recipient.toml that came with the key")


def load_recipient_key(path: Path) -> RecipientKey:
    """The private key in a file ``ROLE.recipient.key``.

    Raises:
        ConfigError: no file, others may read it, or it is damaged.
    """
    data, mode = _read(path)
    if mode & 0o077:
        raise ConfigError(
            f"{path} may be read or changed by others (mode {mode:03o})",
            hint=f"run: chmod 600 {path}; if others had access to it, make a new key instead",
        )
    first = _FIRST_LINE.match(data)
    try:
        key = load_pem_private_key(data[first.end() :], None) if first else None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if first is None or not isinstance(key, X25519PrivateKey):
        raise ConfigError(f"{str(path)!r} holds no recipient's key, or a damaged one", hint=f"restore it, or {_MAKE}")
    return RecipientKey(first[1].decode(), key)


def _read(path: Path) -> tuple[bytes, int]:
    """Content and mode of a small regular file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{str(path)!r} is no file", hint="give a key file")
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES), stat.S_IMODE(status.st_mode)
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}", hint=f"give a key file, or {_MAKE}") from None
