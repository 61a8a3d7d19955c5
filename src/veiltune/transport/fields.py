"""What a field of a message may hold, and how each type stands in a frame's header.

A plan is made once a class from its annotations: one `FieldCodec` a field. The types are ``int``, ``float``, ``bool``,
``str``, ``bytes``, ``torch.Tensor``, a JSON object (``dict[str, Any]``), and of these ``X | None``, ``tuple[X, ...]``
and ``dict[str, X]``. A ``bool`` is not an ``int``, an ``int`` fits 64 bits, NaN and infinities are floats too.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

MAX_JSON_DEPTH = 32
MIN_INT, MAX_INT = -(1 << 63), (1 << 63) - 1


class Mismatch(Exception):  # noqa: N818 - never leaves the codec, which turns it into a FrameError with the field's name
    """A value is not what its field's annotation says."""


class BlobWriter(ABC):
    """Takes what does not belong in JSON, and gives the number that stands for it there."""

    __slots__ = ()

    @abstractmethod
    def tensor(self, value: Tensor) -> int:
        """Add a tensor of any shape."""

    @abstractmethod
    def blob(self, value: bytes) -> int:
        """Add bytes."""


class BlobReader(ABC):
    """Gives back what a `BlobWriter` took. The numbers come from the wire: they may be anything."""

    __slots__ = ()

    @abstractmethod
    def tensor(self, index: Any) -> Tensor:
        """The tensor of that number."""

    @abstractmethod
    def blob(self, index: Any) -> bytes:
        """The bytes of that number."""


class FieldCodec(NamedTuple):
    """One type's way into the header (``pack``) and out (``unpack``). Both raise `Mismatch`."""

    pack: Callable[[Any, BlobWriter], Any]
    unpack: Callable[[Any, BlobReader], Any]


@functools.cache
def plan(message_type: type[Any]) -> tuple[tuple[str, FieldCodec], ...]:
    """The codecs of a message class's fields, in order.

    Raises:
        TypeError: a field is annotated with a type that frames do not carry.
    """
    hints = typing.get_type_hints(message_type)
    return tuple((field.name, codec_of(hints[field.name])) for field in dataclasses.fields(message_type))


def codec_of(hint: Any) -> FieldCodec:
    """The codec of one annotation.

    Raises:
        TypeError: frames do not carry it.
    """
    if isinstance(hint, type) and hint in _LEAVES:
        return _LEAVES[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union) and len(args) == 2 and types.NoneType in args:
        return _optional(codec_of(args[0] if args[1] is types.NoneType else args[1]))
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return _tuple(codec_of(args[0]))
    if origin is dict and args[0] is str:
        return _JSON_OBJECT if args[1] in (Any, object) else _mapping(codec_of(args[1]))
    raise TypeError(f"a message field cannot be annotated {hint!r}; see veiltune.transport.fields for what can")


# --- leaves -----------------------------------------------------------------------------------------------------------


def _int(value: Any, _: object) -> int:
    if type(value) is not int:
        raise _wrong("int", value)
    if not MIN_INT <= value <= MAX_INT:
        raise Mismatch("the integer does not fit 64 bits")
    return value


def _pack_float(value: Any, _: object) -> float:
    return float(value) if isinstance(value, float) or type(value) is int else _float(value, None)


def _float(value: Any, _: object) -> float:
    if type(value) is not float:
        raise _wrong("float", value)
    return value


def _bool(value: Any, _: object) -> bool:
    if type(value) is not bool:
        raise _wrong("bool", value)
    return value


def _str(value: Any, _: object) -> str:
    if not isinstance(value, str):
        raise _wrong("str", value)
    return value


def _pack_bytes(value: Any, blobs: BlobWriter) -> int:
    if not isinstance(value, bytes):
        raise _wrong("bytes", value)
    return blobs.blob(value)


def _pack_tensor(value: Any, blobs: BlobWriter) -> int:
    if not isinstance(value, Tensor):
        raise _wrong("Tensor", value)
    return blobs.tensor(value)


def _unpack_bytes(value: Any, blobs: BlobReader) -> bytes:
    return blobs.blob(value)


def _unpack_tensor(value: Any, blobs: BlobReader) -> Tensor:
    return blobs.tensor(value)


def _json_object(value: Any, _: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong("a JSON object", value)
    return _json(value, MAX_JSON_DEPTH)


def _json(value: Any, depth: int) -> Any:
    """A copy of a JSON value, checked. Tuples become lists, as they would anyway."""
    if depth == 0:
        raise Mismatch(f"the JSON is nested deeper than {MAX_JSON_DEPTH}")
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise Mismatch("a name in the JSON is not a str")
        return {name: _json(item, depth - 1) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item, depth - 1) for item in value]
    if value is None or isinstance(value, (bool, str, float)):
        return value
    return _int(value, None)


_LEAVES: dict[type[Any], FieldCodec] = {
    int: FieldCodec(_int, _int),
    float: FieldCodec(_pack_float, _float),
    bool: FieldCodec(_bool, _bool),
    str: FieldCodec(_str, _str),
    bytes: FieldCodec(_pack_bytes, _unpack_bytes),
    Tensor: FieldCodec(_pack_tensor, _unpack_tensor),
}
_JSON_OBJECT = FieldCodec(_json_object, _json_object)


# --- combinations -----------------------------------------------------------------------------------------------------


def _optional(inner: FieldCodec) -> FieldCodec:
    def pack(value: Any, blobs: BlobWriter) -> Any:
        return None if value is None else inner.pack(value, blobs)

    def unpack(value: Any, blobs: BlobReader) -> Any:
        return None if value is None else inner.unpack(value, blobs)

    return FieldCodec(pack, unpack)


def _tuple(inner: FieldCodec) -> FieldCodec:
    def pack(value: Any, blobs: BlobWriter) -> list[Any]:
        if not isinstance(value, tuple):
            raise _wrong("tuple", value)
        return [inner.pack(item, blobs) for item in value]

    def unpack(value: Any, blobs: BlobReader) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _wrong("a list", value)
        return tuple([inner.unpack(item, blobs) for item in value])

    return FieldCodec(pack, unpack)


def _mapping(inner: FieldCodec) -> FieldCodec:
    def pack(value: Any, blobs: BlobWriter) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise _wrong("a dict with names of type str", value)
        return {name: inner.pack(item, blobs) for name, item in value.items()}

    def unpack(value: Any, blobs: BlobReader) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong("an object", value)
        return {name: inner.unpack(item, blobs) for name, item in value.items()}

    return FieldCodec(pack, unpack)


def _wrong(expected: str, value: object) -> Mismatch:
    return Mismatch(f"expected {expected}, got {type(value).__name__}")
