"""What really crossed: the `Meter` counts it always, the `Transcript` records it on request.

Both observe channels (see `Observer`), so cost figures and attackers' views come from the same frames. A transcript
file holds everything one observer saw, as it saw it: it is created for its owner alone (mode 0600).

Format of a transcript, version 1, little-endian::

    8  magic b"VTNTRACE"
    4  H, then H bytes of JSON: {"version": 1, "observer": …, "created": …, "fingerprint": …}
    records, each:  b"R", direction (1; 0 sent, 1 received), the peer's length (2), sequence (8), time in ns (8),
                    length of the frame (8), the peer's name in UTF-8, the frame
    trailer:        b"T", number of records (8), SHA-256 of everything before the digest (32)

The digest finds damage and careless edits. It is no signature: who can rewrite the file can rewrite the digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal, Self

from veiltune.errors import DataError, FrameError
from veiltune.transport.codec import Registry, decode
from veiltune.transport.frame import Frame
from veiltune.transport.messages import MESSAGES, Message

TRANSCRIPT_VERSION = 1
MAX_TRANSCRIPT_HEADER_BYTES = 1 << 20

Direction = Literal["sent", "received"]
Traffic = dict[str, dict[str, dict[str, int]]]
"""Directed pair ("owner->enclave") to kind to ``{"messages": n, "bytes": n}``: plain JSON."""

_MAGIC = b"VTNTRACE"
_LENGTH = struct.Struct("<I")
_RECORD = struct.Struct("<cBHQQQ")
_TRAILER_COUNT = struct.Struct("<cQ")
_TRAILER_BYTES = _TRAILER_COUNT.size + hashlib.sha256().digest_size
_DIRECTIONS: tuple[Direction, Direction] = ("sent", "received")
_READ_BYTES = 1 << 20


class Meter:
    """Counts messages and bytes by sender, receiver and kind. Bytes are whole frames, header and padding included.

    Give one party's meter to all of that party's channels. The two ends of a link need two meters, or each message
    counts twice.

    Args:
        me: the party whose channels this observes.
    """

    def __init__(self, me: str) -> None:
        self.me = me
        self._messages: Counter[tuple[str, str, str]] = Counter()
        self._bytes: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()

    def sent(self, peer: str, kind: str, frame: Frame) -> None:
        """Count a frame that went out."""
        self._count((self.me, peer, kind), frame)

    def received(self, peer: str, kind: str, frame: Frame) -> None:
        """Count a frame that came in."""
        self._count((peer, self.me, kind), frame)

    def snapshot(self) -> Traffic:
        """The counts so far. Later traffic does not change what this returned."""
        with self._lock:
            traffic: Traffic = {}
            for key in sorted(self._messages):
                sender, receiver, kind = key
                counts = {"messages": self._messages[key], "bytes": self._bytes[key]}
                traffic.setdefault(f"{sender}->{receiver}", {})[kind] = counts
            return traffic

    def crossings(self, since: Traffic | None = None) -> int:
        """Messages that crossed, either way, after the snapshot ``since`` (None: ever)."""
        return sum(
            counts["messages"]
            for kinds in traffic_since(self.snapshot(), since or {}).values()
            for counts in kinds.values()
        )

    def _count(self, key: tuple[str, str, str], frame: Frame) -> None:
        with self._lock:
            self._messages[key] += 1
            self._bytes[key] += frame.num_bytes


def traffic_since(now: Traffic, before: Traffic) -> Traffic:
    """The traffic between two snapshots of one meter: ``now`` less ``before``, without what did not change."""
    difference: Traffic = {}
    for pair, kinds in now.items():
        for kind, counts in kinds.items():
            earlier = before.get(pair, {}).get(kind, {})
            change = {name: count - earlier.get(name, 0) for name, count in counts.items()}
            if change["messages"]:
                difference.setdefault(pair, {})[kind] = change
    return difference


def merge_traffic(snapshots: Iterable[Traffic]) -> Traffic:
    """One table from several parties' snapshots. Both ends of a link report it; the larger count stands."""
    merged: Traffic = {}
    for snapshot in snapshots:
        for pair, kinds in snapshot.items():
            for kind, counts in kinds.items():
                held = merged.setdefault(pair, {}).setdefault(kind, {"messages": 0, "bytes": 0})
                held.update({name: max(held[name], count) for name, count in counts.items()})
    return merged


# --- recording --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TranscriptHeader:
    """Whose transcript it is, of which run. ``created`` is UTC in ISO 8601; ``fingerprint`` is the configuration's."""

    version: int
    observer: str
    created: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Record:
    """One frame that the observer sent or received. ``time_ns`` is the observer's monotonic clock."""

    sequence: int
    direction: Direction
    peer: str
    time_ns: int
    num_bytes: int


class Transcript:
    """Writes every frame that one observer sends or receives to a new file. Close it, or the file counts as truncated.

    Args:
        path: the file to create.
        observer: the party whose channels this observes.
        fingerprint: of the run's configuration.

    Raises:
        DataError: the file exists.
    """

    def __init__(self, path: Path | str, observer: str, *, fingerprint: str = "") -> None:
        self.path = Path(path)
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        except FileExistsError as error:
            raise DataError(f"{self.path} exists", hint="a transcript is never overwritten; name another") from error
        self._file = os.fdopen(descriptor, "wb")
        self._digest = hashlib.sha256()
        self._count = 0
        self._lock = threading.Lock()
        created = datetime.now(UTC).isoformat(timespec="seconds")
        header = json.dumps(asdict(TranscriptHeader(TRANSCRIPT_VERSION, observer, created, fingerprint))).encode()
        self._write(_MAGIC + _LENGTH.pack(len(header)) + header)

    def sent(self, peer: str, kind: str, frame: Frame) -> None:  # noqa: ARG002 - the frame names its kind
        """Record a frame that went out."""
        self._record(0, peer, frame)

    def received(self, peer: str, kind: str, frame: Frame) -> None:  # noqa: ARG002
        """Record a frame that came in."""
        self._record(1, peer, frame)

    def close(self) -> None:
        """Write the trailer. May be called again."""
        with self._lock:
            if not self._file.closed:
                self._write(_TRAILER_COUNT.pack(b"T", self._count))
                self._file.write(self._digest.digest())
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, direction: int, peer: str, frame: Frame) -> None:
        name = peer.encode()
        with self._lock:
            now = time.monotonic_ns()
            self._write(_RECORD.pack(b"R", direction, len(name), self._count, now, frame.num_bytes) + name + frame.head)
            for segment in frame.segments:
                self._write(segment)
            self._count += 1

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_transcript_header(path: Path | str) -> TranscriptHeader:
    """Whose transcript a file is.

    Raises:
        DataError: it is none, or of another version.
    """
    with Path(path).open("rb") as file:
        return _read_header(file, Path(path))


def read_transcript(path: Path | str, registry: Registry = MESSAGES) -> Iterator[tuple[Record, Message]]:
    """Iterate over what an observer sent and received, in order. The whole file is verified before this returns.

    Raises:
        DataError: the file is no transcript, of another version, truncated, or was changed after it was written.
    """
    path = Path(path)
    with path.open("rb") as file:
        _read_header(file, path)
        count = _verify(file, path)
    return _records(path, count, registry)


def _read_header(file: BinaryIO, path: Path) -> TranscriptHeader:
    start = file.read(len(_MAGIC) + _LENGTH.size)
    if not start.startswith(_MAGIC[: len(start)]) or not start:
        raise DataError(f"{path} is not a transcript")
    if len(start) < len(_MAGIC) + _LENGTH.size:
        raise _truncated(path)
    (length,) = _LENGTH.unpack(start[len(_MAGIC) :])
    if length > MAX_TRANSCRIPT_HEADER_BYTES:
        raise DataError(f"{path}: a header of {length} bytes exceeds the limit of {MAX_TRANSCRIPT_HEADER_BYTES}")
    text = file.read(length)
    if len(text) < length:
        raise _truncated(path)
    try:
        header = json.loads(text)
        version = header["version"]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: the transcript's header is damaged") from error
    if version != TRANSCRIPT_VERSION:
        raise DataError(
            f"{path} is a transcript of version {version!r:.40}, not {TRANSCRIPT_VERSION}",
            hint="read it with the Veiltune that wrote it",
        )
    try:
        return TranscriptHeader(**header)
    except TypeError as error:
        raise DataError(f"{path}: the transcript's header is damaged") from error


def _verify(file: BinaryIO, path: Path) -> int:
    """Compare the digest; return the number of records."""
    size = os.fstat(file.fileno()).st_size
    if size < file.tell() + _TRAILER_BYTES:
        raise _truncated(path)
    file.seek(0)
    digest = hashlib.sha256()
    left = size - digest.digest_size
    while left and (piece := file.read(min(left, _READ_BYTES))):
        digest.update(piece)
        left -= len(piece)
    expected = file.read()
    file.seek(size - _TRAILER_BYTES)
    tag, count = _TRAILER_COUNT.unpack(file.read(_TRAILER_COUNT.size))
    if digest.digest() != expected or tag != b"T":
        raise DataError(
            f"{path} is truncated or was changed after it was written: its SHA-256 differs from its trailer's",
            hint="record the run again; a party that was killed leaves no trailer",
        )
    return count


def _records(path: Path, count: int, registry: Registry) -> Iterator[tuple[Record, Message]]:
    with path.open("rb") as file:
        _read_header(file, path)
        end = os.fstat(file.fileno()).st_size - _TRAILER_BYTES
        for expected in range(count):
            fixed = file.read(min(_RECORD.size, end - file.tell()))
            if len(fixed) < _RECORD.size:
                raise _truncated(path)
            tag, direction, name_bytes, sequence, time_ns, num_bytes = _RECORD.unpack(fixed)
            if tag != b"R" or direction > 1 or sequence != expected or name_bytes + num_bytes > end - file.tell():
                raise DataError(f"{path}: record {expected} is damaged")
            peer = file.read(name_bytes).decode(errors="replace")
            frame = bytearray(num_bytes)
            file.readinto(frame)
            try:
                message = decode(frame, registry, copy=False)
            except FrameError as error:
                raise DataError(f"{path}: record {expected}: {error.message}", hint=error.hint) from error
            yield Record(sequence, _DIRECTIONS[direction], peer, time_ns, num_bytes), message
        if file.tell() != end:
            raise DataError(f"{path}: the trailer counts {count} records, and more follow")


def _truncated(path: Path) -> DataError:
    return DataError(f"{path} is truncated", hint="record the run again; a party that was killed leaves no trailer")
