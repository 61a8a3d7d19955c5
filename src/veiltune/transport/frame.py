"""The frame: how one message lies on a wire or in a file, whatever it holds.

Format, version 1, little-endian::

    at 0      4  magic b"VTN1"
    at 4      4  H, the header's length; 16 + H is a multiple of 64
    at 8      8  P, the payload's length
    at 16     H  header: compact JSON in UTF-8, padded with spaces
    at 16+H   P  payload: blobs in order, each at the next multiple of 64, zero bytes between, nothing after the last

    header = {"kind": "SegmentForward", "fields": {name: value, …}, "blobs": [[dtype, shape, offset, num_bytes], …]}

A field that holds a tensor (or ``bytes``, of dtype "bytes") has in the header the index of its blob, and blobs are
numbered in the order in which the fields name them. So a message has exactly one layout: gaps, overlaps, spare blobs
and reordering are all errors. `veiltune.transport.codec` makes messages of frames.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from veiltune.errors import FrameError

MAGIC = b"VTN1"
PREAMBLE_BYTES = 16
ALIGNMENT = 64
MAX_HEADER_BYTES = 16 << 20
MAX_PAYLOAD_BYTES = 8 << 30
MAX_HEADER_ITEMS = 1 << 18  # commas and opening brackets: bounds what parsing the header can allocate

_PREAMBLE = struct.Struct("<4sIQ")


class Frame:
    """One message as bytes, in pieces, so that a tensor's memory is never joined to anything before it is sent.

    Args:
        kind: the message's class name.
        head: preamble and header.
        segments: the payload's pieces in order. They alias the message's tensors.
        payload_bytes: the segments' total length.
    """

    __slots__ = ("head", "kind", "payload_bytes", "segments")

    def __init__(self, kind: str, head: bytes, segments: list[memoryview], payload_bytes: int) -> None:
        self.kind = kind
        self.head = head
        self.segments = segments
        self.payload_bytes = payload_bytes

    @property
    def num_bytes(self) -> int:
        """What the frame weighs on a wire, preamble and header included."""
        return len(self.head) + self.payload_bytes

    def to_bytes(self) -> bytes:
        """The frame in one piece (copies)."""
        return b"".join((self.head, *self.segments))


def read_preamble(preamble: bytes | memoryview, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> tuple[int, int]:
    """Check the first 16 bytes of a frame and return the lengths of its header and payload in bytes.

    Raises:
        FrameError: not this format or version, or a length beyond its limit.
    """
    if len(preamble) != PREAMBLE_BYTES:
        raise FrameError(f"truncated: {len(preamble)} of the preamble's {PREAMBLE_BYTES} bytes")
    magic, header_bytes, payload_bytes = _PREAMBLE.unpack(preamble)
    if magic != MAGIC:
        raise FrameError(
            f"the frame begins with {magic!r}, not {MAGIC!r}", hint="both ends must run the same Veiltune wire version"
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"a header of {header_bytes} bytes exceeds the limit of {MAX_HEADER_BYTES}")
    if not header_bytes or (PREAMBLE_BYTES + header_bytes) % ALIGNMENT:
        raise FrameError(f"a header of {header_bytes} bytes does not end at a multiple of {ALIGNMENT}")
    if payload_bytes > max_payload_bytes:
        raise FrameError(f"a payload of {payload_bytes} bytes exceeds the limit of {max_payload_bytes}")
    return header_bytes, payload_bytes


def pack_head(header: dict[str, Any], payload_bytes: int) -> bytes:
    """Preamble and padded header.

    Raises:
        FrameError: the header exceeds its limits or cannot be written as UTF-8.
    """
    try:
        text = _to_json(header).encode()
    except UnicodeEncodeError as error:
        raise FrameError("a string holds a lone surrogate, which UTF-8 cannot carry") from error
    text += b" " * (-(PREAMBLE_BYTES + len(text)) % ALIGNMENT)
    _check_header_size(text)
    return _PREAMBLE.pack(MAGIC, len(text), payload_bytes) + text


def parse_header(text: bytes) -> Any:
    """The JSON of a header, whose content is still unchecked.

    Raises:
        FrameError: it is too large, not JSON, names something twice, or is followed by more than its padding.
    """
    _check_header_size(text)
    try:
        string = text.decode()
        value, end = _JSON.raw_decode(string)
        if "\\u" in string:  # an escape can smuggle in a lone surrogate, which would break whoever prints it
            _to_json(value).encode()
    except (ValueError, RecursionError) as error:
        raise FrameError(f"the header is not JSON that may be sent ({type(error).__name__})") from error
    if string[end:].strip(" ") or len(string) - end >= ALIGNMENT:
        raise FrameError("the header's JSON is followed by something other than its padding")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is given twice")
    return table


def _check_header_size(text: bytes) -> None:
    if len(text) > MAX_HEADER_BYTES:
        raise FrameError(f"a header of {len(text)} bytes exceeds the limit of {MAX_HEADER_BYTES}")
    items = text.count(b",") + text.count(b"[") + text.count(b"{")
    if items > MAX_HEADER_ITEMS:
        raise FrameError(
            f"a header of {items} items exceeds the limit of {MAX_HEADER_ITEMS}",
            hint="send long lists as tensors",
        )


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode
_JSON = json.JSONDecoder(object_pairs_hook=_unique)
