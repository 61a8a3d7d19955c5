"""Opening a container: the head at once, everything else when it is asked for."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, final

import torch
from cryptography.exceptions import InvalidTag
from torch import Tensor

from veiltune.errors import CheckpointError, nearest
from veiltune.secrets import Secret
from veiltune.tee.container.files import cannot_write
from veiltune.tee.container.keys import DataKey, RecipientKey
from veiltune.tee.container.layout import (
    DTYPES,
    HEAD_BYTES,
    INTACT,
    PROLOGUE_BYTES,
    SLOT_BYTES,
    Entry,
    EntryCipher,
    Index,
    Prologue,
    TensorEntry,
    num_chunks,
)
from veiltune.tee.container.wrapping import (
    EMPTY,
    Binding,
    Opener,
    Sealee,
    make_slot,
    open_slots,
    split_slots,
    unwrap,
    wrap,
)
from veiltune.tee.sealing import CHUNK_BYTES, TAG_BYTES, SealingKey


@final
class Container(Secret):
    """An open container; a context manager. Nothing is decrypted but what is asked for, and nothing comes unverified.

    Threads may read at once. Use `open_container`.
    """

    def __init__(self, name: str, file: BinaryIO, key: DataKey, binding: Binding, index: Index) -> None:
        self._name = name
        self._file = file
        self._key = key
        self._binding = binding
        self._index = index
        weakref.finalize(self, file.close)  # whoever forgets to close it lets go of it at last

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    @cached_property
    def _entries(self) -> dict[str, list[Entry]]:
        """By file: the file itself, or its header and then its tensors."""
        found: dict[str, list[Entry]] = {}
        for file, entry in self._index.entries():
            found.setdefault(file.name, []).append(entry)
        return found

    @cached_property
    def _tensors(self) -> dict[str, Entry]:
        return {entry.name: entry for _, entry in self._index.entries() if entry.tensor is not None}

    @property
    def files(self) -> Mapping[str, int]:
        """Size in bytes of every file, by name."""
        return MappingProxyType({file.name: file.num_bytes for file in self._index.files})

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Shape, dtype and size of every tensor, by name, in the order of the files."""
        return MappingProxyType({tensor.name: tensor for file in self._index.files for tensor in file.tensors})

    def tensors_of(self, file: str) -> Mapping[str, TensorEntry]:
        """The tensors of one file, in its order; none if it has none, or is not there."""
        return {entry.name: entry.tensor for entry in self._entries.get(file, ()) if entry.tensor is not None}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all that can be opened: files (for :meth:`read`), then tensors (for :meth:`tensor`)."""
        return (*self.files, *self._tensors)

    @property
    def identity(self) -> bytes:
        """What tells containers apart, sealings of the same model too; public. Copies have the same."""
        return self._binding.prologue.identity

    @property
    def directory(self) -> bool:
        """Whether it was made of a directory."""
        return self._index.directory

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, as it was stored.

        Raises:
            CheckpointError: no such tensor, a dtype that torch does not have, or it was altered.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self._name} has no tensor {name!r}", hint=nearest(name, self._tensors))
        entry = self._tensors[name]
        said = entry.tensor
        if said is None or said.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {name!r} of {self._name} is of a dtype that is not known", hint="read its file instead"
            )
        raw = torch.empty(entry.num_bytes, dtype=torch.uint8)
        for _ in self._plain(entry, raw.numpy().data):
            pass
        return raw.view(DTYPES[said.dtype]).reshape(said.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, up to 1 MiB at a time, each verified before it comes.

        Raises:
            CheckpointError: no such file, or it was altered; what came before is then genuine, but not the whole.
        """
        if name not in self._entries:
            raise CheckpointError(f"{self._name} has no file {name!r}", hint=nearest(name, self._entries))
        for entry in self._entries[name]:
            yield from self._plain(entry)

    def read(self, name: str) -> bytes:
        """A whole file, as it was; for a safetensors file, header and tensors.

        Raises:
            CheckpointError: no such file, or it was altered.
        """
        return b"".join(self.chunks(name))

    def wrap(self, recipient: Sealee, *, purpose: str | None = None) -> bytes:
        """The data key for one more recipient, to be sent rather than kept in the container.

        It opens with ``open_container(…, wrapped=…)``. ``purpose`` is the container's own by default; a job, say.

        Raises:
            ConfigError: the recipient's public key is not valid.
        """
        return wrap(self._key, recipient, Binding(self._binding.prologue, purpose or self._binding.purpose))

    def _plain(self, entry: Entry, into: memoryview | None = None) -> Iterator[bytes]:
        """Chunk by chunk; written to ``into`` if that is given, else handed out."""
        cipher = EntryCipher(self._key, self._binding.prologue, entry)
        offset = HEAD_BYTES + self._binding.prologue.index_bytes + entry.offset
        for chunk in range(num_chunks(entry.num_bytes)):
            start = chunk * CHUNK_BYTES
            stored = _read_at(self._file, offset, min(CHUNK_BYTES, entry.num_bytes - start) + TAG_BYTES, self._name)
            offset += len(stored)
            try:
                yield cipher.decrypt(chunk, stored, None if into is None else into[start : start + CHUNK_BYTES])
            except InvalidTag:
                raise CheckpointError(
                    f"chunk {chunk} of {entry.name!r} in {self._name} was altered or moved", hint=INTACT
                ) from None

    def _describe(self) -> str:
        return f"Container {self._name}"


def open_container(path: Path, key: Opener, *, purpose: str = "model", wrapped: bytes | None = None) -> Container:
    """Open a container's head; what is in it is read when it is asked for.

    Args:
        path: the container.
        key: of one of its recipients, or the data key itself.
        purpose: as it was sealed for, or wrapped for.
        wrapped: the wrapped data key, if it came by another way than in the container (:meth:`Container.wrap`).

    Raises:
        CheckpointError: missing, not a container, altered, cut, or not for this key, purpose, role or enclave.
        ConfigError: the purpose is empty or too long.
    """
    name = str(path)
    file = _open_file(path, name)
    try:
        return _open(name, file, key, purpose, wrapped)
    except BaseException:
        file.close()
        raise


def read_identity(path: Path) -> bytes:
    """What a container is known by (`Container.identity`), without a key: anybody can read it, and nobody vouches for it.

    Raises:
        CheckpointError: missing, or not a container.
    """
    name = str(path)
    with _open_file(path, name) as file:
        return Prologue.decode(
            _read_at(file, 0, min(os.fstat(file.fileno()).st_size, PROLOGUE_BYTES), name), name
        ).identity


def _open_file(path: Path, name: str) -> Any:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"cannot open {name!r}: {error.strerror}", hint="check the container's path") from None


def _open(name: str, file: Any, key: Opener, purpose: str, wrapped: bytes | None) -> Container:
    size = os.fstat(file.fileno()).st_size
    head = _read_at(file, 0, min(size, HEAD_BYTES), name)
    binding = Binding(Prologue.decode(head[:PROLOGUE_BYTES], name), purpose)
    if len(head) < HEAD_BYTES or HEAD_BYTES + binding.prologue.index_bytes > size:
        raise CheckpointError(f"{name} was cut", hint=INTACT)
    if wrapped is None or isinstance(key, DataKey):
        data_key = open_slots(head[PROLOGUE_BYTES:], key, binding, name)
    else:
        data_key = unwrap(wrapped, key, binding, name)
    sealed = _read_at(file, HEAD_BYTES, binding.prologue.index_bytes, name)
    index = Index.unseal(sealed, data_key, binding.prologue, name)
    if HEAD_BYTES + len(sealed) + index.stored_bytes() != size:
        raise CheckpointError(f"{name} was cut, or something was added to it: it has {size} bytes", hint=INTACT)
    return Container(name, file, data_key, binding, index)


def add_recipient(path: Path, key: RecipientKey | SealingKey, recipient: Sealee, *, purpose: str = "model") -> None:
    """Seal a container for one more recipient: 256 bytes are written, in place; the rest stays as it is.

    Raises:
        CheckpointError: it does not open (see `open_container`), the disk refuses, or all 15 slots are taken.
        ConfigError: the recipient's public key is not valid.
    """
    import fcntl

    with open_container(path, key, purpose=purpose) as container:
        slot = make_slot(container._key, recipient, container._binding)
    try:
        with path.open("r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another process may be adding one
            slots = split_slots(_read_at(file, PROLOGUE_BYTES, HEAD_BYTES - PROLOGUE_BYTES, str(path)))
            if EMPTY not in slots:
                raise CheckpointError(
                    f"{path} has {len(slots)} recipients, which is all it can have", hint="unseal it and seal it anew"
                )
            os.pwrite(file.fileno(), slot, PROLOGUE_BYTES + slots.index(EMPTY) * SLOT_BYTES)
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from None


def _read_at(file: Any, offset: int, size: int, name: str) -> bytes:
    """Exactly ``size`` bytes.

    Raises:
        CheckpointError: the file is shorter, or cannot be read.
    """
    parts: list[bytes] = []
    while size > 0:
        try:
            part = os.pread(file.fileno(), size, offset)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            raise CheckpointError(f"{name} cannot be read: {error}", hint="check the disk") from None
        if not part:
            raise CheckpointError(f"{name} was cut", hint=INTACT)
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
