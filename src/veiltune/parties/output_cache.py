"""The owner's cache of the trunk's output: in `gradfree` an example crosses once, and is read from here ever after.

A folder holds one file an example, ``NAME.safetensors``, or ``NAME.sealed`` if a key is given (`veiltune.tee.sealing` has
the format). The tensor is called ``hidden``; the metadata says which run and example it is of and, where no seal
vouches for it, a checksum. NAME is made of the example's token ids, as 64-bit little-endian integers:

    without a key   SHA-256(ids), hex
    with a key      HMAC-SHA256(key', ids), hex, with key' the sealing key's subkey for this run's names

*Reveals*, to whoever can read the disk: without a key, everything: hidden states can be inverted, and the hash of a
short or guessable text can be found by trying. With a key, how many examples there are, how many tokens each has (by
its file's length), and when each was stored. Names of one example in two runs' caches do not match.

*Limits*: one process at a time writes a folder.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from veiltune.errors import CheckpointError, ConfigError
from veiltune.tee.sealing import CHUNK_BYTES, TAG_BYTES, SealingKey, seal, unseal

OPTION: Final = "gradfree.cache.max_bytes"
_ENTRY: Final = re.compile(r"([0-9a-f]{64})\.(safetensors|sealed)")
_PARTIAL: Final = re.compile(r"\.[0-9a-f]{64}\.\w+\.partial")
_MAX_DIGITS: Final = 20  # of a number in a file's header


@final
class OutputCache:
    """Trunk outputs by example, kept on disk and found again by the next process.

    Args:
        directory: the cache's own folder; made when something is first stored.
        fingerprint: of what the outputs depend on; a folder of another one is refused.
        max_bytes: the most its files may take together.
        key: seals the files (AES-256-GCM) and hides their names. Without it they are plain safetensors.

    Raises:
        CheckpointError: the folder's entries are of another fingerprint or key, sealed where they should not be (or
            the other way round), or damaged (one is tried).
    """

    def __init__(self, directory: Path, fingerprint: str, *, max_bytes: int, key: SealingKey | None) -> None:
        self.directory = directory
        self.fingerprint = fingerprint
        self.max_bytes = max_bytes
        self.key = key
        self._suffix = "safetensors" if key is None else "sealed"
        self._sizes = {path.stem: path.stat().st_size for path in self._files(_ENTRY)}
        self._num_bytes = sum(self._sizes.values())
        for partial in self._files(_PARTIAL):
            partial.unlink()  # of a process that died
        self._check_whose()

    def _files(self, pattern: re.Pattern[str]) -> Iterator[Path]:
        if self.directory.is_dir():
            yield from (path for path in sorted(self.directory.iterdir()) if pattern.fullmatch(path.name))

    def _check_whose(self) -> None:
        for path in self._files(_ENTRY):
            if path.suffix != f".{self._suffix}":
                kinds = ("not sealed", "to be sealed") if self.key is not None else ("sealed", "not to be")
                raise CheckpointError(f"{str(path)!r} is {kinds[0]}, and this cache is {kinds[1]}", hint=self._hint)
        if self._sizes:
            self._read(min(self._sizes))

    @property
    def _hint(self) -> str:
        return f"use the configuration and key it began with, or delete {str(self.directory)!r}: examples cross again"

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def num_bytes(self) -> int:
        """What the stored files take together, in bytes."""
        return self._num_bytes

    def _name(self, ids: Sequence[int]) -> str:
        data = np.asarray(ids, dtype="<i8").tobytes()
        if self.key is None:
            return hashlib.sha256(data).hexdigest()
        return hmac.digest(self.key.subkey(f"output-cache/names/{self.fingerprint}"), data, "sha256").hex()

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.{self._suffix}"

    def _context(self, name: str) -> str:
        return f"output-cache:{self.fingerprint}:{name}"

    def missing(self, ids: Sequence[int]) -> bool:
        """Whether the example with these token ids has yet to cross."""
        return self._name(ids) not in self._sizes

    def require_room(self, num_tokens: int, width: int, dtype: torch.dtype, *, num_examples: int) -> None:
        """Check, before anything crosses, that all that is missing will fit.

        Args:
            num_tokens: of the missing examples together.
            width: numbers a token.
            dtype: of the tensors to be stored.
            num_examples: how many are missing (each file has a header).

        Raises:
            ConfigError: it would not fit.
        """
        header = len(self._plain("0" * 64, torch.empty(0, width, dtype=dtype))) + 2 * _MAX_DIGITS
        data = num_tokens * width * dtype.itemsize
        seals = num_examples * (len(seal(b"", self.key, "")) + TAG_BYTES) if self.key is not None else 0
        seals += TAG_BYTES * (data // CHUNK_BYTES) if self.key is not None else 0
        self._require(
            self._num_bytes + num_examples * header + data + seals, f"{num_examples} examples of {num_tokens} tokens"
        )

    def _require(self, needed: int, what: str) -> None:
        if needed > self.max_bytes:
            raise ConfigError(
                f"the cache of trunk outputs would take {needed} bytes with {what} more; "
                f"{OPTION} allows {self.max_bytes}",
                hint=f"set {OPTION} to at least {needed}, or use fewer or shorter examples",
            )

    def put(self, ids: Sequence[int], hidden: Float[Tensor, "seq d"]) -> None:
        """Store the trunk's output for one example, whole or not at all; what was stored for it before is replaced.

        Args:
            ids: the example's token ids.
            hidden: a row a token, on any device, of any floating dtype.

        Raises:
            ConfigError: the cache would exceed its bound.
            CheckpointError: the disk refuses it (full, say).
            ValueError: not a row a token.
        """
        if len(hidden) != len(ids):
            raise ValueError(f"{len(hidden)} rows of trunk output for {len(ids)} tokens")
        name = self._name(ids)
        data = self._plain(name, hidden.detach().cpu().contiguous())
        if self.key is not None:
            data = seal(data, self.key, self._context(name))
        total = self._num_bytes + len(data) - self._sizes.get(name, 0)
        self._require(total, f"an example of {len(ids)} tokens")
        try:
            self._write(self._path(name), data)
        except OSError as error:
            hint = "make room, or point the output to another disk; what is stored already is kept"
            raise CheckpointError(
                f"cannot store trunk outputs in {str(self.directory)!r}: {error.strerror}", hint=hint
            ) from None
        self._sizes[name], self._num_bytes = len(data), total

    def _plain(self, name: str, hidden: Tensor) -> bytes:
        from safetensors.torch import save

        metadata = {"fingerprint": self.fingerprint, "example": name, "crc32": f"{_checksum(hidden):08x}"}
        return save({"hidden": hidden}, metadata)

    def _write(self, path: Path, data: bytes) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.directory, prefix=f".{path.stem}.", suffix=".partial")  # mode 600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # a lost rename is a missing example; a torn file would be a damaged one
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def get(self, ids: Sequence[int]) -> Float[Tensor, "seq d"]:
        """What was stored for the example with these token ids: on the CPU, in the dtype it had, the caller's own copy.

        Raises:
            CheckpointError: nothing is stored for it, or its file is damaged, or belongs to another example or run.
        """
        return self._read(self._name(ids))

    def _read(self, name: str) -> Tensor:
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self._path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise CheckpointError(
                f"no trunk output is stored in {str(path)!r}", hint="start again: what is missing crosses again"
            ) from None
        except OSError as error:
            raise self._damaged(name, str(error.strerror)) from None
        if self.key is not None:
            try:
                data = unseal(data, self.key, self._context(name))
            except CheckpointError:
                raise self._damaged(name, "altered, cut, or sealed for another run, example or key") from None
        try:
            hidden = load(data)["hidden"]
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        except (SafetensorError, KeyError, ValueError) as error:
            raise self._damaged(name, f"not a stored trunk output ({error})") from None
        self._check(name, hidden, metadata)
        return hidden

    def _check(self, name: str, hidden: Tensor, metadata: dict[str, str]) -> None:
        if metadata.get("fingerprint") != self.fingerprint:
            raise CheckpointError(
                f"{str(self._path(name))!r} belongs to a run with another configuration", hint=self._hint
            )
        if metadata.get("example") != name:
            raise self._damaged(name, "it is another example's")
        if self.key is None and metadata.get("crc32") != f"{_checksum(hidden):08x}":
            raise self._damaged(name, "its checksum does not match")

    def _damaged(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{str(self._path(name))!r} cannot be used: {why}", hint=self._hint)

    def clear(self) -> None:
        """Delete every stored output, and nothing else that may be in the folder."""
        for path in (*self._files(_ENTRY), *self._files(_PARTIAL)):
            path.unlink()
        self._sizes.clear()
        self._num_bytes = 0


def _checksum(hidden: Tensor) -> int:
    """CRC-32 of dtype, shape and bytes: against a disk's accidents, not against anybody."""
    kind = f"{hidden.dtype} {tuple(hidden.shape)}".encode()
    return zlib.crc32(hidden.reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(kind))
