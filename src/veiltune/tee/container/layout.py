"""The bytes of a sealed container: what lies where, under which key and nonce.

The format, version 1, little-endian::

    offset  size
    0       8     magic "VEILCONT"
    8       4     version = 1
    12      32    salt, fresh for every container
    44      32    commitment to the data key
    76      8     L, length of the sealed index
    84      172   zeros
    256     3840  15 slots of 256 bytes, each the data key wrapped for one recipient, or zeros (`wrapping`)
    4096    L     the index: sealed state (`tee.sealing`) of JSON, which names files and tensors with their sizes
    4096+L  …     the entries, in the index's order, without gaps, to the end of the file

An *entry* is a file; or of a safetensors file its header, and then each of its tensors by itself, in the file's order.
It is cut into chunks of 1 MiB, of which only the last may be shorter; an empty entry is one empty chunk. A chunk is
stored as its ciphertext, as long as the chunk, and a tag of 16 bytes.

*Keys.* A fresh data key K of 32 bytes for every container; it encrypts nothing itself::

    subkey(label) = HKDF-SHA256(K, salt, "veiltune/v1/subkey/" + label)     (`secrets.ByteSecret.subkey`)
    commitment    = subkey("container/commitment")
    index         sealed under subkey("container/index") with the context "container/index/1"
    entry n       AES-256-GCM under subkey("container/entry/" + n + "/" + its name)

*Nonces.* The nonce of a chunk is its number in the entry, 12 bytes, big-endian. An entry's subkey serves one entry of
one container, which is written once, so no nonce is used twice under a key. Nothing is ever encrypted again in place:
what changes in a finished container is a slot, and a slot's encryption has a fresh key of its own. The associated data
of a chunk is the number of its entry (8 bytes), its own (8 bytes), and a byte that is 1 for the entry's last chunk.

So all but the keys in other recipients' slots is authenticated: salt and commitment by the commitment, L and the index by the
index's sealing, the size of the file by the index. A chunk that was altered, moved within its entry, to another entry
or to another container, or that is missing, is refused when it is read; a file that is shorter or longer, at opening.
The commitment sees to it that all recipients have the same key, and so read the same (AES-GCM alone does not).

*Reference*: the cutting is STREAM (Hoang, Reyhanitabar, Rogaway and Vizár, CRYPTO 2015, §5) with random access; the
commitment is that of Albertini et al., "How to Abuse and Fix Authenticated Encryption Without Key Commitment", USENIX
Security 2022, §5, with HKDF in the hash's place.

*Reveals*, to whoever holds the disk: the length of the file and of the index, how many recipients there are, for which
public keys (slots hold a digest of them), and when it was written. Names, sizes and shapes of tensors are in the index.

*Limits*: it does not say who made it. Whoever has a recipient's public key can seal another container for it and put
it in the place of the right one; a key that came over an authenticated channel opens the right one alone. An older
container in the place of a newer one opens too.
"""

from __future__ import annotations

import hmac
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import Field, ValidationError, model_validator

from veiltune.config import Section
from veiltune.errors import CheckpointError
from veiltune.secrets import Secret
from veiltune.tee import sealing
from veiltune.tee.container.keys import DataKey
from veiltune.tee.sealing import CHUNK_BYTES, SALT_BYTES, TAG_BYTES, SealingKey

MAGIC: Final = b"VEILCONT"
VERSION: Final = 1
PROLOGUE_BYTES: Final = 256
SLOT_BYTES: Final = 256
NUM_SLOTS: Final = 15
HEAD_BYTES: Final = PROLOGUE_BYTES + NUM_SLOTS * SLOT_BYTES
MAX_INDEX_BYTES: Final = 64 << 20
INTACT: Final = "use an intact copy"
_PROLOGUE: Final = struct.Struct("<8sI32s32sQ")
_POSITION: Final = struct.Struct("<QQ?")
_INDEX_CONTEXT: Final = "container/index/1"
_MAX_SIZE: Final = (1 << 63) - 1

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Torch's types by the names of safetensors. Tensors of other types are sealed too, but open as part of their file."""


@dataclass(frozen=True, slots=True)
class Prologue:
    """The first bytes of a container.

    Attributes:
        salt: 32 bytes, fresh.
        commitment: 32 bytes, which belong to one data key.
        index_bytes: length of the sealed index.
    """

    salt: bytes
    commitment: bytes
    index_bytes: int

    @classmethod
    def fresh(cls, key: DataKey) -> Prologue:
        """That of a new container, whose index is not known yet."""
        salt = os.urandom(SALT_BYTES)
        return cls(salt, _commitment(key, salt), 0)

    @property
    def identity(self) -> bytes:
        """What tells this container from every other: salt and commitment."""
        return self.salt + self.commitment

    def encode(self) -> bytes:
        """Its 256 bytes."""
        fixed = _PROLOGUE.pack(MAGIC, VERSION, self.salt, self.commitment, self.index_bytes)
        return fixed.ljust(PROLOGUE_BYTES, b"\0")

    @classmethod
    def decode(cls, data: bytes, name: str) -> Prologue:
        """What :meth:`encode` made; ``name`` is what errors call the container.

        Raises:
            CheckpointError: not a container, or of another version, or too long an index.
        """
        if len(data) != PROLOGUE_BYTES or not data.startswith(MAGIC):
            raise CheckpointError(f"{name} is not a sealed container", hint="check that this is the file meant")
        _, version, salt, commitment, index_bytes = _PROLOGUE.unpack_from(data)
        if version != VERSION:
            raise CheckpointError(
                f"{name} has container version {version}, not {VERSION}", hint="use a matching Veiltune"
            )
        if index_bytes > MAX_INDEX_BYTES or any(data[_PROLOGUE.size :]):
            raise CheckpointError(f"the head of {name} was altered", hint=INTACT)
        return cls(salt, commitment, index_bytes)

    def require_key(self, key: DataKey, name: str) -> None:
        """Raise CheckpointError if ``key`` is not the one that the container was made with."""
        if not hmac.compare_digest(_commitment(key, self.salt), self.commitment):
            raise CheckpointError(
                f"{name} does not open: its head was altered, or the key is another container's", hint=INTACT
            )


def _commitment(key: DataKey, salt: bytes) -> bytes:
    return key.subkey("container/commitment", salt=salt)


class TensorEntry(Section):
    """One tensor of a safetensors file; ``dtype`` is safetensors' own name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int = Field(ge=0, le=_MAX_SIZE)

    @model_validator(mode="after")
    def _fits(self) -> TensorEntry:
        if any(size < 0 for size in self.shape):
            raise ValueError("negative size")
        if self.dtype in DTYPES and math.prod(self.shape) * DTYPES[self.dtype].itemsize != self.num_bytes:
            raise ValueError("shape and size differ")
        return self


class FileEntry(Section):
    """One file: ``head_bytes`` (all of it, but for a safetensors file its header alone), then its tensors."""

    name: str
    head_bytes: int = Field(ge=0, le=_MAX_SIZE)
    tensors: tuple[TensorEntry, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of the plain file."""
        return self.head_bytes + sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is encrypted by itself.

    Attributes:
        number: its place among all entries, which its subkey depends on.
        name: of the file or the tensor, which its subkey depends on.
        offset: of its first chunk, from the first chunk of the first entry.
        num_bytes: size of its plaintext.
        tensor: what it is, unless it is a file or its header.
    """

    number: int
    name: str
    offset: int
    num_bytes: int
    tensor: TensorEntry | None = None


class Index(Section):
    """What a container holds. ``directory``: it was made of a directory, not of a single file."""

    directory: bool
    files: tuple[FileEntry, ...]

    @model_validator(mode="after")
    def _names(self) -> Index:
        files = [file.name for file in self.files]
        tensors = [tensor.name for file in self.files for tensor in file.tensors]
        if not all(is_plain_name(name) for name in files) or not all(name.isprintable() for name in tensors):
            raise ValueError("a name that is no plain one")
        if len(set(files)) < len(files) or len(set(tensors)) < len(tensors):
            raise ValueError("a name stands twice")
        if not self.directory and len(files) != 1:
            raise ValueError("not a single file")
        return self

    def entries(self) -> Iterator[tuple[FileEntry, Entry]]:
        """All entries in order, each with the file that it is of."""
        number = offset = 0
        for file in self.files:
            pieces = [(file.name, file.head_bytes, None), *((t.name, t.num_bytes, t) for t in file.tensors)]
            for name, num_bytes, tensor in pieces:
                yield file, Entry(number, name, offset, num_bytes, tensor)
                number, offset = number + 1, offset + stored_bytes(num_bytes)

    def stored_bytes(self) -> int:
        """Size of all entries as they are stored."""
        return sum(stored_bytes(entry.num_bytes) for _, entry in self.entries())

    def seal(self, key: DataKey, prologue: Prologue) -> bytes:
        """Its encryption."""
        return sealing.seal(self.model_dump_json().encode(), _index_key(key, prologue), _INDEX_CONTEXT)

    @classmethod
    def unseal(cls, sealed: bytes, key: DataKey, prologue: Prologue, name: str) -> Index:
        """What :meth:`seal` made; ``name`` is what errors call the container.

        Raises:
            CheckpointError: it was altered, or makes no sense.
        """
        try:
            return cls.model_validate_json(sealing.unseal(sealed, _index_key(key, prologue), _INDEX_CONTEXT))
        except CheckpointError:
            raise CheckpointError(f"the index of {name} was altered or cut", hint=INTACT) from None
        except ValidationError as error:
            where = ".".join(map(str, error.errors(include_input=False)[0]["loc"])) or "its names"
            raise CheckpointError(f"the index of {name} makes no sense at {where!r}", hint="do not use it") from None


def _index_key(key: DataKey, prologue: Prologue) -> SealingKey:
    return SealingKey(key.subkey("container/index", salt=prologue.salt))


def is_plain_name(name: str) -> bool:
    """Whether a name can stand for a file in a directory, in every sense of the word, and be printed."""
    return name.isprintable() and Path(name).name == name and name != ".."


def num_chunks(num_bytes: int) -> int:
    """Chunks of an entry."""
    return max(1, -(-num_bytes // CHUNK_BYTES))


def stored_bytes(num_bytes: int) -> int:
    """Size of an entry as it is stored: with its tags."""
    return num_bytes + TAG_BYTES * num_chunks(num_bytes)


class EntryCipher(Secret):
    """Encrypts the chunks of one entry, each once, or decrypts them in any order."""

    __slots__ = ("__cipher", "_entry", "_last")

    def __init__(self, key: DataKey, prologue: Prologue, entry: Entry) -> None:
        label = f"container/entry/{entry.number}/{entry.name}"
        self.__cipher = AESGCM(key.subkey(label, salt=prologue.salt))
        self._entry = entry
        self._last = num_chunks(entry.num_bytes) - 1

    def encrypt(self, chunk: int, plain: bytes) -> bytes:
        """Ciphertext and tag of chunk number ``chunk``."""
        return self.__cipher.encrypt(*self._arguments(chunk, plain))

    def decrypt(self, chunk: int, stored: bytes, into: memoryview | None = None) -> bytes:
        """The plaintext of chunk number ``chunk``; written to ``into`` if that is given, and then not returned.

        Raises:
            InvalidTag: it is not what was written there.
        """
        nonce, data, where = self._arguments(chunk, stored)
        if into is None or not len(into):
            return self.__cipher.decrypt(nonce, data, where)
        if len(data) != len(into) + TAG_BYTES:
            raise InvalidTag
        self.__cipher.decrypt_into(nonce, data, where, into)
        return b""

    def _arguments(self, chunk: int, data: bytes) -> tuple[bytes, bytes, bytes]:
        return chunk.to_bytes(12, "big"), data, _POSITION.pack(self._entry.number, chunk, chunk == self._last)
