"""Secrets as handles: what must never reach a log, a traceback, a pickle or a message.

A :class:`Secret` can be passed around and used, but not printed, formatted, copied, pickled or put in JSON. The raw
bytes of a :class:`ByteSecret` come out through :meth:`ByteSecret.reveal` and nowhere else, so one search of the source
for ``reveal(`` finds every place that handles them.

All random matrices of a session are expanded from one :class:`MasterSecret` of 32 bytes: it is all that a sealed
checkpoint has to keep in order to have every key again. What is derived for one label says nothing about another:

    subkey(label)       = HKDF-SHA256(master, salt, info = "veiltune/v1/subkey/" + label)
    expand(label, n)    = first n bytes of AES-256-CTR under HKDF-SHA256(master, info = "veiltune/v1/stream/" + label)

*Reference*: HKDF is RFC 5869; CTR mode is NIST SP 800-38A §6.5 (the counter starts at 0: a key serves one stream).

*Limits*: Python cannot wipe memory. A handle keeps a secret out of what the program writes, not out of a core dump.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from typing import ClassVar, Final, NoReturn, SupportsIndex, TypeVar

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.base import CipherContext
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from jaxtyping import Float, Int
from torch import Tensor

SECRET_BYTES: Final = 32
_DOMAIN: Final = "veiltune/v1"
_S = TypeVar("_S", bound="ByteSecret")
_CHUNK_PAIRS: Final = 1 << 17  # pairs of normals made at a time: 2 MiB of keystream, so temporaries stay in cache
_ZEROS: Final = bytes(16 * _CHUNK_PAIRS)


class Secret:
    """Base of every handle to something secret.

    Subclasses override :meth:`_describe` to add *public* words to the repr.
    """

    __slots__ = ()

    def _describe(self) -> str:
        return type(self).__name__

    def __repr__(self) -> str:
        return f"<Secret {self._describe()} redacted>"

    def __str__(self) -> str:
        return repr(self)

    def __format__(self, format_spec: str) -> str:
        return repr(self)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"{self!r} cannot be pickled or copied; seal it instead (veiltune.tee.sealing)")

    def __copy__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be copied; pass the handle itself")

    def __deepcopy__(self, memo: dict[int, object]) -> NoReturn:
        raise TypeError(f"{self!r} cannot be copied; pass the handle itself")


class ByteSecret(Secret):
    """A secret of 32 bytes.

    Attributes:
        reproducible: True when it was made from a public seed, so that it protects nothing.
    """

    __slots__ = ("__raw", "reproducible")
    _purpose: ClassVar[str] = "secret"

    def __init__(self, raw: bytes, *, reproducible: bool = False) -> None:
        """Wrap existing bytes (of an unsealed checkpoint, say).

        Raises:
            ValueError: ``raw`` is not 32 bytes long.
        """
        if len(raw) != SECRET_BYTES:
            raise ValueError(f"a {type(self).__name__} is {SECRET_BYTES} bytes long, got {len(raw)}")
        self.__raw = bytes(raw)
        self.reproducible = reproducible

    @classmethod
    def generate(cls: type[_S]) -> _S:  # noqa: PYI019  (the run-time checker cannot follow Self)
        """A fresh secret from the operating system's generator."""
        return cls(os.urandom(SECRET_BYTES))

    @classmethod
    def for_tests(cls: type[_S], seed: int) -> _S:  # noqa: PYI019
        """NOT SECRET: the same bytes for the same ``seed``, for tests and demonstrations only."""
        digest = hashlib.sha256(f"{_DOMAIN}/not-secret/{cls._purpose}/{seed}".encode()).digest()
        return cls(digest, reproducible=True)

    def reveal(self) -> bytes:
        """The raw 32 bytes. Every call of this is a place to audit."""
        return self.__raw

    def subkey(self, label: str, *, salt: bytes | None = None) -> bytes:
        """32 bytes for ``label``, independent of other labels and salts and of :meth:`MasterSecret.expand`."""
        return self._derive("subkey", label, salt)

    def _derive(self, purpose: str, label: str, salt: bytes | None = None) -> bytes:
        info = f"{_DOMAIN}/{purpose}/{label}".encode()
        return HKDF(algorithm=hashes.SHA256(), length=SECRET_BYTES, salt=salt, info=info).derive(self.__raw)

    def _describe(self) -> str:
        return f"{type(self).__name__} reproducible" if self.reproducible else type(self).__name__


class MasterSecret(ByteSecret):
    """The one secret of a session; every key is expanded from it by label."""

    __slots__ = ()
    _purpose = "master"

    def _keystream(self, label: str) -> CipherContext:
        key = self._derive("stream", label)
        return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def expand(self, label: str, num_bytes: int) -> bytes:
        """The first ``num_bytes`` bytes of the stream of ``label``; fewer bytes are a prefix of more."""
        stream = self._keystream(label)
        sizes = (min(len(_ZEROS), num_bytes - start) for start in range(0, num_bytes, len(_ZEROS)))
        return b"".join(stream.update(memoryview(_ZEROS)[:size]) for size in sizes)

    def _uniform_pairs(self, label: str, num_pairs: int) -> Iterator[Float[Tensor, "pairs 2"]]:
        """Uniforms on (0, 1] with 53 random bits, float64, a chunk at a time."""
        stream = self._keystream(label)
        for start in range(0, num_pairs, _CHUNK_PAIRS):
            size = min(_CHUNK_PAIRS, num_pairs - start)
            words = np.frombuffer(stream.update(memoryview(_ZEROS)[: 16 * size]), dtype="<u8")
            units = ((words >> np.uint64(11)) + np.uint64(1)).astype(np.float64)
            yield torch.from_numpy(units).mul_(2.0**-53).view(-1, 2)

    def normal(self, label: str, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
        """Independent standard normal numbers, float64 on the CPU.

        *Reference*: Box and Muller, Annals of Mathematical Statistics 29 (1958): for U, V uniform on (0, 1],
        √(-2 ln U)·(cos 2πV, sin 2πV) are two independent standard normals. With 53 bits, none exceeds 8.6.

        Two machines may differ in the last bit (their logarithms and sines do), which is below any use made of it.
        """
        count = math.prod(shape)
        num_pairs = (count + 1) // 2
        normals = torch.empty(num_pairs, 2, dtype=torch.float64)
        start = 0
        for pairs in self._uniform_pairs(label, num_pairs):
            radius = pairs[:, 0].log().mul_(-2.0).sqrt_()
            angle = pairs[:, 1] * (2.0 * math.pi)
            block = normals[start : start + len(pairs)]
            torch.mul(radius, angle.cos(), out=block[:, 0])
            torch.mul(radius, angle.sin(), out=block[:, 1])
            start += len(pairs)
        return normals.view(-1)[:count].view(shape)

    def permutation(self, label: str, size: int) -> Int[Tensor, " size"]:
        """A uniformly random order of 0 … size - 1: the order that sorts as many 64-bit words of the stream.

        Equal words would favour one order; among ``size`` words that has a chance below size²·2⁻⁶⁵.
        """
        words = np.frombuffer(self.expand(label, 8 * size), dtype="<u8")
        return torch.from_numpy(np.argsort(words, kind="stable").astype(np.int64))
