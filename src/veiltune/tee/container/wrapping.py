"""The data key of a container, wrapped for each recipient.

A slot, 256 bytes::

    offset  size
    0       1     kind: 0 for an empty slot (all zeros), 1 for HPKE, 2 for a sealing key
    1       1     length of the wrapped key
    2       16    whose slot it is: the beginning of a digest of the recipient's key
    18      …     the wrapped key, then zeros

Kind 1 is HPKE (RFC 9180) in base mode with X25519, HKDF-SHA256 and AES-256-GCM: 80 bytes. Kind 2 is sealed state
(`tee.sealing`) under a local sealing key: 92 bytes. Both are bound to the same ``info`` (kind 2 by its digest in the context):
a domain tag and canonical JSON of the container (salt and commitment), the purpose, the recipient's role, and the digest
of its runtime data. Nothing of that is read from the container but salt and commitment: the opener says what it is and
what for, and another purpose, role, enclave or container does not open.

HPKE draws a fresh encapsulation key, and sealing a fresh salt, for every wrapping, so slots never share a nonce. A slot
is written in one piece within a sector of the disk. Slots prove nothing of one another: whoever holds the disk can spoil
one, of which its recipient alone learns (a container with a slot of another form than above is refused by all), or
bring an older one back, but not make one that opens.
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag

from veiltune.errors import CheckpointError, ConfigError
from veiltune.secrets import SECRET_BYTES
from veiltune.tee import sealing
from veiltune.tee.attestation.wire import canonical
from veiltune.tee.container.keys import DataKey, Recipient, RecipientKey
from veiltune.tee.container.layout import NUM_SLOTS, SLOT_BYTES, Prologue
from veiltune.tee.sealing import SealingKey

Sealee = Recipient | SealingKey
"""What a container can be sealed for."""
Opener = RecipientKey | SealingKey | DataKey
"""What can open one."""

_HPKE: Final = 1
_LOCAL: Final = 2
_WRAPPED_BYTES: Final = {_HPKE: 80, _LOCAL: 92}
_ID_BYTES: Final = 16
_FIXED: Final = 2 + _ID_BYTES
_DOMAIN: Final = b"veiltune/v1/container-key\x00"
_MAX_PURPOSE: Final = 200
EMPTY: Final = bytes(SLOT_BYTES)


class Binding(NamedTuple):
    """What a wrapped key is for: which container, and the purpose that both sides state."""

    prologue: Prologue
    purpose: str

    def info(self, role: str, runtime_sha256: bytes) -> bytes:
        """HPKE's ``info``."""
        if not 0 < len(self.purpose) <= _MAX_PURPOSE:
            raise ConfigError(f"a purpose of {len(self.purpose)} letters", hint=f"1 to {_MAX_PURPOSE}")
        return _DOMAIN + canonical(
            {
                "version": 1,
                "container": self.prologue.identity.hex(),
                "purpose": self.purpose,
                "role": role,
                "runtime_sha256": runtime_sha256.hex(),
            }
        )

    def context(self) -> str:
        """The context of a local sealing key."""
        return f"container-key/{hashlib.sha256(self.info('', b'')).hexdigest()}"


def wrap(key: DataKey, sealee: Sealee, binding: Binding) -> bytes:
    """The data key for one recipient.

    Raises:
        ConfigError: the recipient's public key is not valid, or no purpose is given.
    """
    if isinstance(sealee, SealingKey):
        return sealing.seal(key.reveal(), sealee, binding.context())
    return sealee.encrypt(key.reveal(), binding.info(sealee.role, sealee.runtime_sha256))


def unwrap(wrapped: bytes, opener: RecipientKey | SealingKey, binding: Binding, name: str) -> DataKey:
    """What :func:`wrap` made, once it is known to be the container's; ``name`` is what errors call that.

    Raises:
        CheckpointError: altered, or wrapped for another key, purpose, role, enclave or container.
    """
    try:
        if isinstance(opener, SealingKey):
            raw = sealing.unseal(wrapped, opener, binding.context())
        else:
            raw = opener.decrypt(wrapped, binding.info(opener.recipient.role, opener.recipient.runtime_sha256))
    except (InvalidTag, CheckpointError):
        raw = b""
    if len(raw) != SECRET_BYTES:
        raise CheckpointError(
            f"the key of {name} does not open for {opener!r} and the purpose {binding.purpose!r}: it was altered, or "
            "wrapped for another key, purpose, role or state of the enclave",
            hint="use an intact copy, or have it sealed for this recipient",
        ) from None
    key = DataKey(raw)
    binding.prologue.require_key(key, name)
    return key


def make_slots(key: DataKey, sealees: list[Sealee], binding: Binding) -> bytes:
    """All slots of a new container.

    Raises:
        ConfigError: nobody to seal for, or too many.
    """
    if not 0 < len(sealees) <= NUM_SLOTS:
        raise ConfigError(f"{len(sealees)} recipients", hint=f"a container is sealed for 1 to {NUM_SLOTS}")
    return b"".join(make_slot(key, sealee, binding) for sealee in sealees).ljust(NUM_SLOTS * SLOT_BYTES, b"\0")


def make_slot(key: DataKey, sealee: Sealee, binding: Binding) -> bytes:
    """One slot."""
    wrapped = wrap(key, sealee, binding)
    kind = _LOCAL if isinstance(sealee, SealingKey) else _HPKE
    return (bytes([kind, len(wrapped)]) + _identify(sealee) + wrapped).ljust(SLOT_BYTES, b"\0")


def split_slots(slots: bytes) -> list[bytes]:
    """Slot by slot."""
    return [slots[start : start + SLOT_BYTES] for start in range(0, len(slots), SLOT_BYTES)]


def open_slots(slots: bytes, opener: Opener, binding: Binding, name: str) -> DataKey:
    """The container's data key, from the slot that is the opener's, or from its own hand.

    Raises:
        CheckpointError: no slot is, or it does not open (see `unwrap`), or one has another form than a slot has.
    """
    if isinstance(opener, DataKey):
        binding.prologue.require_key(opener, name)
        return opener
    failure = CheckpointError(
        f"{name} is not sealed for {opener!r}", hint="give the key of one of its recipients, or have it sealed for this"
    )
    for wrapped in _meant_for(slots, opener, name):
        try:
            return unwrap(wrapped, opener, binding, name)
        except CheckpointError as error:  # there may be another, for another purpose
            failure = error
    raise failure


def _meant_for(slots: bytes, opener: RecipientKey | SealingKey, name: str) -> list[bytes]:
    """The wrapped keys in the slots of one recipient."""
    kind = _LOCAL if isinstance(opener, SealingKey) else _HPKE
    mine = _identify(opener if isinstance(opener, SealingKey) else opener.recipient)
    found: list[bytes] = []
    for number, slot in enumerate(split_slots(slots)):
        if slot == EMPTY:
            continue
        end = _FIXED + slot[1]
        if slot[1] != _WRAPPED_BYTES.get(slot[0]) or any(slot[end:]):
            raise CheckpointError(f"slot {number} of {name} was altered", hint="use an intact copy")
        if slot[0] == kind and slot[2:_FIXED] == mine:
            found.append(slot[_FIXED:end])
    return found


def _identify(sealee: Sealee) -> bytes:
    """What a slot calls its recipient. Of a sealing key it tells nothing but that it is the same one."""
    if isinstance(sealee, SealingKey):
        return sealee.subkey("container/recipient")[:_ID_BYTES]
    return hashlib.sha256(_DOMAIN + sealee.public_key).digest()[:_ID_BYTES]
