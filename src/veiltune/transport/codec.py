"""Messages to frames and back (`veiltune.transport.frame` has the format).

What crosses is data only: the decoder builds a class out of a table of known ones, never one it was told to import. It
trusts nothing: every length is compared with its limit before memory is taken for it, and whatever is wrong is a
`FrameError` that names it. Error texts never quote the value of a field, which may be private.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veiltune.errors import FrameError
from veiltune.transport import fields as field_types
from veiltune.transport.fields import BlobReader, BlobWriter, Mismatch
from veiltune.transport.frame import (
    ALIGNMENT,
    MAX_PAYLOAD_BYTES,
    PREAMBLE_BYTES,
    Frame,
    pack_head,
    parse_header,
    read_preamble,
)
from veiltune.transport.messages import MESSAGES, Message

MAX_DIMENSIONS = 16
MAX_ELEMENTS = 1 << 48

Registry = Mapping[str, type[Message]]

_ZEROS = memoryview(bytes(ALIGNMENT))
_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    )
} | {"bytes": torch.uint8}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items() if name != "bytes"}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in _DTYPES.items()}


# --- encoding -------------------------------------------------------------------------------------------------------


class _Writer(BlobWriter):
    """Collects a message's blobs."""

    __slots__ = ("end", "rows", "segments")

    def __init__(self) -> None:
        self.rows: list[tuple[str, Sequence[int], int, int]] = []
        self.segments: list[memoryview] = []
        self.end = 0

    def tensor(self, value: Tensor) -> int:
        name = _DTYPE_NAMES.get(value.dtype)
        if name is None or value.layout is not torch.strided or value.is_meta:
            raise Mismatch(f"a {value.layout} tensor of {value.dtype} on {value.device} is not carried")
        return self._add(name, value.shape, _bytes_of(value.detach().cpu().contiguous()))

    def blob(self, value: bytes) -> int:
        return self._add("bytes", (len(value),), memoryview(value))

    def _add(self, name: str, shape: Sequence[int], view: memoryview) -> int:
        offset = _aligned(self.end)
        if offset > self.end:
            self.segments.append(_ZEROS[: offset - self.end])
        if view:
            self.segments.append(view)
        self.rows.append((name, shape, offset, len(view)))
        self.end = offset + len(view)
        return len(self.rows) - 1


def encode(message: Message) -> Frame:
    """Lay a message out as a frame. The frame aliases the message's contiguous CPU tensors: send it before they change.

    Raises:
        FrameError: a field holds what its annotation or the format does not allow.
    """
    kind = type(message).__name__
    writer = _Writer()
    values: dict[str, Any] = {}
    for name, codec in field_types.plan(type(message)):
        try:
            values[name] = codec.pack(getattr(message, name), writer)
        except Mismatch as mismatch:
            raise FrameError(f"{kind}.{name}: {mismatch}") from None
    try:
        head = pack_head({"kind": kind, "fields": values, "blobs": writer.rows}, writer.end)
    except FrameError as error:
        raise FrameError(f"{kind}: {error.message}", hint=error.hint) from error
    return Frame(kind, head, writer.segments, writer.end)


def _aligned(end: int) -> int:
    return -(-end // ALIGNMENT) * ALIGNMENT


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


# --- decoding -------------------------------------------------------------------------------------------------------


class Incoming(BlobReader):
    """A frame whose head has arrived and names a known kind, and whose payload has not been read.

    Call `allocate`, fill what it returns from the wire, then `message`. Channels ask `kind` first, so that a kind that
    may not be received costs no memory.

    Args:
        head: preamble and header, in memory that nobody else can write.
        registry: the message classes that may be built, by name.

    Raises:
        FrameError: the header is malformed or names an unknown kind.
    """

    __slots__ = ("_fields", "_next", "_rows", "_tensors", "cls", "head", "kind", "payload_bytes", "segments")

    def __init__(
        self, head: bytes, registry: Registry = MESSAGES, *, max_payload_bytes: int = MAX_PAYLOAD_BYTES
    ) -> None:
        header_bytes, self.payload_bytes = read_preamble(head[:PREAMBLE_BYTES], max_payload_bytes)
        if len(head) != PREAMBLE_BYTES + header_bytes:
            raise FrameError(f"truncated: {len(head) - PREAMBLE_BYTES} of the header's {header_bytes} bytes")
        self.head = head
        header = parse_header(head[PREAMBLE_BYTES:])
        if type(header) is not dict or header.keys() != {"kind", "fields", "blobs"}:
            raise FrameError("the header is not an object of kind, fields and blobs")
        kind, self._fields, self._rows = header["kind"], header["fields"], header["blobs"]
        cls = registry.get(kind) if type(kind) is str else None
        if cls is None:
            raise FrameError(f"unknown message kind {_short(kind)}")
        if type(self._fields) is not dict or type(self._rows) is not list:
            raise FrameError(f"{kind}: fields must be an object and blobs a list")
        self.kind: str = kind
        self.cls = cls
        self._tensors: list[Tensor] = []
        self.segments: list[memoryview] = []
        self._next = 0

    def allocate(self) -> list[memoryview]:
        """Make the tensors, not yet filled, and return the memory to read the payload into, piece by piece in order.

        Raises:
            FrameError: a blob's dtype, shape, offset or size is wrong.
        """
        end = 0
        for name, shape, offset, num_bytes in self._layout():
            if offset > end:
                self.segments.append(memoryview(bytearray(offset - end)))
            try:
                tensor = torch.empty(shape, dtype=_DTYPES[name], device="cpu")
            except RuntimeError:  # what torch says when there is no memory
                raise FrameError(
                    f"{self.kind}: there is no memory for a payload of {self.payload_bytes} bytes"
                ) from None
            if num_bytes:
                self.segments.append(_bytes_of(tensor))
            self._tensors.append(tensor)
            end = offset + num_bytes
        return self.segments

    def adopt(self, payload: memoryview) -> None:
        """Use ``payload`` itself as the tensors' memory, instead of `allocate`.

        Raises:
            FrameError: as `allocate`.
            ValueError: the memory is read-only.
        """
        if payload.readonly:
            raise ValueError("tensors cannot live in read-only memory; decode with copy=True")
        end = 0
        for name, shape, offset, num_bytes in self._layout():
            if offset > end:
                self.segments.append(payload[end:offset])
            end = offset + num_bytes
            if num_bytes:
                self.segments.append(payload[offset:end])
                tensor = torch.frombuffer(self.segments[-1], dtype=_DTYPES[name]).view(shape)
            else:
                tensor = torch.empty(shape, dtype=_DTYPES[name], device="cpu")
            self._tensors.append(tensor)

    def message(self) -> Message:
        """Build the message, once the payload has been read.

        Raises:
            FrameError: a field is missing, unknown or of the wrong type; padding is not zero; a boolean is not 0 or 1.
        """
        self._check_payload()
        codecs = field_types.plan(self.cls)
        if len(codecs) != len(self._fields) or any(name not in self._fields for name, _ in codecs):
            raise FrameError(f"{self.kind}: {_difference(self._fields, [name for name, _ in codecs])}")
        values: dict[str, Any] = {}
        for name, codec in codecs:
            try:
                values[name] = codec.unpack(self._fields[name], self)
            except Mismatch as mismatch:
                raise FrameError(f"{self.kind}.{name}: {mismatch}") from None
        if self._next != len(self._rows):
            raise FrameError(f"{self.kind}: {len(self._rows) - self._next} blobs belong to no field")
        try:
            return self.cls(**values)
        except (TypeError, ValueError) as error:
            refusal = f"{self.kind}: the class refuses these values ({type(error).__name__})"
            raise FrameError(refusal) from None  # the class's own words may quote a value

    def frame(self) -> Frame:
        """The frame as it arrived. Aliases the message's tensors."""
        return Frame(self.kind, self.head, self.segments, self.payload_bytes)

    # the two below serve `fields`

    def tensor(self, index: Any) -> Tensor:
        """The tensor of the next blob, which must be the one that the field names."""
        return self._take(index, is_bytes=False)

    def blob(self, index: Any) -> bytes:
        """The bytes of the next blob, which must be the one that the field names."""
        return bytes(_bytes_of(self._take(index, is_bytes=True)))

    def _take(self, index: Any, *, is_bytes: bool) -> Tensor:
        if type(index) is not int or index != self._next or index >= len(self._tensors):
            raise Mismatch(f"expected blob {self._next} of {len(self._tensors)}, got {_short(index)}")
        if (self._rows[index][0] == "bytes") is not is_bytes:
            raise Mismatch(f"expected {'bytes' if is_bytes else 'a tensor'}, got a blob of {self._rows[index][0]}")
        self._next += 1
        return self._tensors[index]

    def _layout(self) -> Iterator[tuple[str, list[int], int, int]]:
        """Check the table of blobs, row by row, and that the payload ends with the last."""
        end = 0
        for index, row in enumerate(self._rows):
            if type(row) is not list or len(row) != 4:
                raise FrameError(f"{self.kind}: blob {index} is not [dtype, shape, offset, num_bytes]")
            name, shape, offset, num_bytes = row
            _check_row(f"{self.kind}: blob {index}", name, shape, num_bytes)
            expected = _aligned(end)
            if type(offset) is not int or offset != expected:
                raise FrameError(
                    f"{self.kind}: blob {index} is at {_short(offset)}, not at {expected}",
                    hint="blobs may neither overlap nor leave gaps",
                )
            end = offset + num_bytes
            if end > self.payload_bytes:
                raise FrameError(f"{self.kind}: blob {index} ends at {end}, beyond a payload of {self.payload_bytes}")
            yield name, shape, offset, num_bytes
        if end != self.payload_bytes:
            raise FrameError(f"{self.kind}: the payload has {self.payload_bytes - end} trailing bytes")

    def _check_payload(self) -> None:
        end = 0
        payload = iter(self.segments)
        for index, (name, _, offset, num_bytes) in enumerate(self._rows):
            if offset > end and any(next(payload)):
                raise FrameError(f"{self.kind}: the padding before blob {index} is not zero")
            if num_bytes:
                next(payload)
            if name == "bool" and bool((self._tensors[index].view(torch.uint8) > 1).any()):
                raise FrameError(f"{self.kind}: blob {index} holds a boolean that is neither 0 nor 1")
            end = offset + num_bytes


def decode(
    data: bytes | bytearray | memoryview,
    registry: Registry = MESSAGES,
    *,
    copy: bool = True,
    max_payload_bytes: int = MAX_PAYLOAD_BYTES,
) -> Message:
    """Read one whole frame.

    Args:
        data: exactly one frame.
        registry: the message classes that may be built, by name.
        copy: whether tensors own fresh memory. With False they live in ``data``, writable and the caller's own.
        max_payload_bytes: the longest payload to accept.

    Raises:
        FrameError: naming what is wrong with the frame.
        ValueError: ``copy=False`` on read-only memory.
    """
    view = memoryview(data).cast("B")
    header_bytes, payload_bytes = read_preamble(view[:PREAMBLE_BYTES], max_payload_bytes)
    start = PREAMBLE_BYTES + header_bytes
    if len(view) != start + payload_bytes:
        difference = len(view) - start - payload_bytes
        what = f"{difference} trailing bytes" if difference > 0 else f"truncated: {-difference} bytes are missing"
        raise FrameError(f"{what} (a frame of {start + payload_bytes} bytes)")
    incoming = Incoming(bytes(view[:start]), registry, max_payload_bytes=max_payload_bytes)
    if copy:
        position = start
        for segment in incoming.allocate():
            segment[:] = view[position : position + len(segment)]
            position += len(segment)
    else:
        incoming.adopt(view[start:])
    return incoming.message()


def _check_row(where: str, name: Any, shape: Any, num_bytes: Any) -> None:
    if type(name) is not str or name not in _ITEM_BYTES:
        raise FrameError(f"{where}: dtype {_short(name)} is not carried", hint=f"carried: {', '.join(_ITEM_BYTES)}")
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
        raise FrameError(f"{where}: the shape is not a list of at most {MAX_DIMENSIONS} sizes")
    if not all(type(size) is int and size >= 0 for size in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise FrameError(f"{where}: {_short(shape)} is not a shape")
    if 0 in shape and math.prod(size or 1 for size in shape) > MAX_ELEMENTS:  # strides would overflow
        raise FrameError(f"{where}: {_short(shape)} is not a shape")
    if name == "bytes" and len(shape) != 1:
        raise FrameError(f"{where}: bytes have one dimension, not {len(shape)}")
    if type(num_bytes) is not int or math.prod(shape) * _ITEM_BYTES[name] != num_bytes:
        raise FrameError(f"{where}: {_short(num_bytes)} bytes for shape {_short(shape)} of {name}")


def _difference(got: Mapping[str, Any], expected: list[str]) -> str:
    missing = [name for name in expected if name not in got]
    unknown = [_short(name) for name in got if name not in expected]
    return "; ".join(
        [f"field {name!r} is missing" for name in missing] + [f"unknown field {name}" for name in unknown[:4]]
    )


def _short(value: Any) -> str:
    """A wire value for an error text: never long."""
    if isinstance(value, list):
        return f"[{', '.join(_short(item) for item in value[:MAX_DIMENSIONS])}]"
    if isinstance(value, (int, str)) and not (isinstance(value, int) and value.bit_length() > 128):
        return repr(value if isinstance(value, int) else value[:48])
    return f"a {type(value).__name__}"
