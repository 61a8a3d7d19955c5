"""Sealed state: what an enclave writes to a disk that it does not trust.

The format, version 1, little-endian::

    offset  size
    0       8     magic "VEILSEAL"
    8       4     version = 1
    12      32    salt, fresh for every sealing
    44      …     chunks: AES-256-GCM of up to 1 MiB of plaintext each, every one but the last of exactly 1 MiB;
                  a chunk is its ciphertext (as long as its plaintext) and a tag of 16 bytes

There is at least one chunk, which is empty if the plaintext is. The key is fresh for every sealing: HKDF-SHA256 of the
sealing key with the salt and a label that holds the context (what the state is, such as ``checkpoint/step-40``). The
nonce of a chunk is its index (11 bytes, big-endian) and a byte that is 1 for the last chunk and otherwise 0; the header
is the associated data. So an altered, missing, added or reordered chunk, a cut at a chunk's edge, a part of another
file, another context, another key and another version are all refused. A file's payload is one safetensors document.

*Reference*: the construction is STREAM (Hoang, Reyhanitabar, Rogaway and Vizár, CRYPTO 2015, §5).

*Reveals*, to whoever holds the disk: the length of the plaintext, and when it was written.

*Limits*: an older file with the same context, put back in its place, opens as it did when it was new: there is no
counter outside the disk's owner's reach. Use a context that tells states of one run apart.
"""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor

from veiltune.errors import CheckpointError
from veiltune.secrets import SECRET_BYTES, ByteSecret

MAGIC: Final = b"VEILSEAL"
VERSION: Final = 1
SALT_BYTES: Final = 32
CHUNK_BYTES: Final = 1 << 20
TAG_BYTES: Final = 16
SIMULATED_KEY_FILE: Final = "simulated-enclave-sealing.key"
_HEADER: Final = struct.Struct(f"<8sI{SALT_BYTES}s")


@final
class SealingKey(ByteSecret):
    """The key that an enclave seals its state with.

    A real enclave gets it from its hardware, bound to its measurement. :meth:`load_or_create` is for the simulated one.
    """

    __slots__ = ()
    _purpose = "sealing"

    @classmethod
    def load_or_create(cls, directory: Path) -> SealingKey:
        """SIMULATED: the key kept in ``directory`` in a plain file that its owner alone may read.

        Whoever can read the file can open everything sealed with it: it stands in for a hardware key so that restarts
        can be tried out, and protects nothing from the machine's owner. Processes that start at once get the same key.

        Raises:
            CheckpointError: the file is readable by others, or is not a key.
        """
        path = directory / SIMULATED_KEY_FILE
        if not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            _create_once(path, cls.generate().reveal())
        require_private(path)
        raw = path.read_bytes()
        if len(raw) != SECRET_BYTES:
            raise CheckpointError(
                f"{path} holds {len(raw)} bytes, which is not a sealing key",
                hint="restore the file; without it what it sealed cannot be opened",
            )
        return cls(raw)


class Unsealed(NamedTuple):
    """What a sealed file held."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def seal(data: bytes | memoryview, key: SealingKey, context: str) -> bytes:
    """Encrypt ``data`` so that it opens under the same ``key`` and ``context`` only."""
    return b"".join(_sealed_parts(memoryview(data).cast("B"), key, context))


def unseal(sealed: bytes | memoryview, key: SealingKey, context: str) -> bytes:
    """Decrypt what :func:`seal` made; nothing is returned before the whole of it has been verified.

    Raises:
        CheckpointError: altered, cut, rearranged, not a sealed state at all, or sealed for another key or context.
    """
    return _open(io.BytesIO(sealed), len(sealed), key, context, f"the sealed state {context!r}")


def seal_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], key: SealingKey, context: str
) -> None:
    """Write ``tensors`` and ``metadata`` to ``path``, sealed, readable by its owner alone, and whole or not at all.

    Tensors may be on any device and in any dtype that safetensors knows. A file already there is replaced.
    """
    from safetensors.torch import save

    # Metadata that is empty is left out: safetensors 0.8 writes a header it cannot read if there are no tensors either.
    plain = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, dict(metadata) or None)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 600
    try:
        with os.fdopen(handle, "wb") as file:
            for part in _sealed_parts(memoryview(plain), key, context):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def unseal_file(path: Path, key: SealingKey, context: str) -> Unsealed:
    """Read what :func:`seal_file` wrote; tensors come on the CPU, and none comes before the whole file is verified.

    Raises:
        CheckpointError: the file is missing, altered, cut, or sealed for another key or context.
    """
    from safetensors.torch import load

    try:
        with path.open("rb") as file:
            plain = _open(file, os.fstat(file.fileno()).st_size, key, context, str(path))
    except FileNotFoundError:
        raise CheckpointError(f"there is no sealed file {path}", hint="check the path of the checkpoint") from None
    header = json.loads(plain[8 : 8 + int.from_bytes(plain[:8], "little")])
    return Unsealed(load(plain), header.get("__metadata__", {}))


def _sealed_parts(plain: memoryview, key: SealingKey, context: str) -> Iterator[bytes]:
    header = _HEADER.pack(MAGIC, VERSION, os.urandom(SALT_BYTES))
    yield header
    cipher = _cipher(header, key, context)
    for index, start in enumerate(range(0, max(len(plain), 1), CHUNK_BYTES)):
        chunk = plain[start : start + CHUNK_BYTES]
        yield cipher.encrypt(_nonce(index, last=start + CHUNK_BYTES >= len(plain)), chunk, header)


def _open(file: io.BufferedIOBase, size: int, key: SealingKey, context: str, name: str) -> bytes:
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise CheckpointError(f"{name} is not sealed state", hint="check that this is the file meant")
    version = _HEADER.unpack(header)[1]
    if version != VERSION:
        raise CheckpointError(f"{name} has sealing version {version}, not {VERSION}", hint="use a matching Veiltune")
    cipher = _cipher(header, key, context)
    chunks: list[bytes] = []
    left = size - _HEADER.size
    while left > 0 or not chunks:
        chunk = file.read(CHUNK_BYTES + TAG_BYTES)
        left -= len(chunk)
        try:
            chunks.append(cipher.decrypt(_nonce(len(chunks), last=left <= 0), chunk, header))
        except InvalidTag:
            raise CheckpointError(
                f"{name} does not open: it was altered or cut, or sealed for another key or purpose",
                hint="use an intact copy, and the enclave (key) that sealed it",
            ) from None
    return b"".join(chunks)


def _cipher(header: bytes, key: SealingKey, context: str) -> AESGCM:
    return AESGCM(key.subkey(f"seal/{context}", salt=_HEADER.unpack(header)[2]))


def _nonce(index: int, *, last: bool) -> bytes:
    return index.to_bytes(11, "big") + (b"\x01" if last else b"\x00")


def _create_once(path: Path, content: bytes) -> None:
    """Make the file ``path`` appear with its whole ``content``, unless another process has made it first."""
    handle, temporary = tempfile.mkstemp(dir=path.parent)  # mode 600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        Path(temporary).unlink()


def require_private(path: Path) -> None:
    """Raise CheckpointError if anybody but its owner may read or change a file."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise CheckpointError(f"{path} may be read by others (mode {mode:03o})", hint=f"run: chmod 600 {path}")


def sync_directory(directory: Path) -> None:
    """Make a rename in ``directory`` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
