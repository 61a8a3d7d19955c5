"""What crossed: counted exactly, recorded whole, and refused when it was touched."""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from veiltune.errors import DataError
from veiltune.transport.channel import ChannelOptions, MemoryChannel, memory_pair
from veiltune.transport.codec import encode
from veiltune.transport.messages import Message
from veiltune.transport.transcript import (
    Meter,
    Record,
    Transcript,
    merge_traffic,
    read_transcript,
    read_transcript_header,
    traffic_since,
)


@dataclass(frozen=True, slots=True)
class Hidden(Message):
    step: int
    states: Tensor


@dataclass(frozen=True, slots=True)
class Done(Message):
    pass


KINDS: dict[str, type[Message]] = {"Hidden": Hidden, "Done": Done}
HIDDEN = Hidden(3, torch.arange(12.0).view(3, 4))
NUM_BYTES = {"Hidden": encode(HIDDEN).num_bytes, "Done": encode(Done()).num_bytes}


def observed_pair(*observers: Meter | Transcript) -> tuple[MemoryChannel, MemoryChannel]:
    """A link of which the first end, the owner's, is observed."""
    options: ChannelOptions = {"registry": KINDS, "observers": observers}
    return memory_pair("owner", "host", a_options=options, b_options={"registry": KINDS})


def talk(owner: MemoryChannel, host: MemoryChannel) -> None:
    """The owner sends two messages and receives one."""
    owner.send(HIDDEN)
    host.send(Done())
    owner.recv(10)
    owner.send(HIDDEN)


def record(path: Path) -> bytes:
    with Transcript(path, "owner", fingerprint="abc") as transcript:
        talk(*observed_pair(transcript))
    return path.read_bytes()


# --- counting ---------------------------------------------------------------------------------------------------------


def test_the_meter_counts_each_pair_and_kind_to_the_byte() -> None:
    meter = Meter("owner")
    talk(*observed_pair(meter))
    assert meter.snapshot() == {
        "host->owner": {"Done": {"messages": 1, "bytes": NUM_BYTES["Done"]}},
        "owner->host": {"Hidden": {"messages": 2, "bytes": 2 * NUM_BYTES["Hidden"]}},
    }
    assert json.loads(json.dumps(meter.snapshot())) == meter.snapshot()
    assert meter.crossings() == 3


def test_a_snapshot_marks_a_point_in_time() -> None:
    meter = Meter("owner")
    pair = observed_pair(meter)
    talk(*pair)
    before = meter.snapshot()
    assert meter.crossings(before) == 0
    assert traffic_since(meter.snapshot(), before) == {}
    pair[0].send(Done())
    assert meter.crossings(before) == 1
    expected = {"owner->host": {"Done": {"messages": 1, "bytes": NUM_BYTES["Done"]}}}
    assert traffic_since(meter.snapshot(), before) == expected
    assert before != meter.snapshot()


def test_counts_are_exact_when_several_threads_send() -> None:
    meter = Meter("owner")
    frame = encode(HIDDEN)
    threads = [
        threading.Thread(target=lambda: [meter.sent("host", "Hidden", frame) for _ in range(2000)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.snapshot() == {"owner->host": {"Hidden": {"messages": 8000, "bytes": 8000 * frame.num_bytes}}}


def test_both_ends_report_the_same_traffic_and_merging_counts_it_once() -> None:
    meters = Meter("owner"), Meter("host")
    owner, host = memory_pair(
        "owner",
        "host",
        a_options={"registry": KINDS, "observers": [meters[0]]},
        b_options={"registry": KINDS, "observers": [meters[1]]},
    )
    talk(owner, host)
    host.recv(10)
    assert meters[0].snapshot() != meters[1].snapshot()  # one message is still on its way
    assert merge_traffic(meter.snapshot() for meter in meters) == meters[0].snapshot()
    host.recv(10)
    assert meters[0].snapshot() == meters[1].snapshot() == merge_traffic(meter.snapshot() for meter in meters)


# --- recording --------------------------------------------------------------------------------------------------------


def test_a_transcript_gives_back_what_the_observer_sent_and_received(tmp_path: Path) -> None:
    path = tmp_path / "owner.trace"
    record(path)
    records, messages = zip(*read_transcript(path, KINDS), strict=True)
    assert [(r.sequence, r.direction, r.peer, r.num_bytes) for r in records] == [
        (0, "sent", "host", NUM_BYTES["Hidden"]),
        (1, "received", "host", NUM_BYTES["Done"]),
        (2, "sent", "host", NUM_BYTES["Hidden"]),
    ]
    assert all(isinstance(r, Record) for r in records)
    assert [r.time_ns for r in records] == sorted(r.time_ns for r in records)
    assert messages[1] == Done()
    for message in (messages[0], messages[2]):
        assert message.step == 3
        assert torch.equal(message.states, HIDDEN.states)
    header = read_transcript_header(path)
    assert (header.version, header.observer, header.fingerprint) == (1, "owner", "abc")
    assert header.created.endswith("+00:00")


def test_a_transcript_without_records_is_whole(tmp_path: Path) -> None:
    Transcript(tmp_path / "empty", "owner").close()
    assert list(read_transcript(tmp_path / "empty", KINDS)) == []


def test_a_transcript_is_its_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "owner.trace"
    data = record(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(DataError, match=r"owner\.trace exists"):
        Transcript(path, "owner")
    assert path.read_bytes() == data


def test_closing_twice_adds_nothing(tmp_path: Path) -> None:
    transcript = Transcript(tmp_path / "t", "owner")
    transcript.close()
    size = (tmp_path / "t").stat().st_size
    transcript.close()
    assert (tmp_path / "t").stat().st_size == size


# --- tampering --------------------------------------------------------------------------------------------------------


def resealed(body: bytes) -> bytes:
    """A body, trailer's count included, with a digest that fits: what a forger would write."""
    return body + hashlib.sha256(body).digest()


def with_version_2(data: bytes) -> bytes:
    return resealed(data[:-32].replace(b'{"version": 1', b'{"version": 2'))


def with_other_magic(data: bytes) -> bytes:
    return b"PK\x03\x04" + data[4:]


def with_vast_header(data: bytes) -> bytes:
    return data[:8] + struct.pack("<I", 1 << 30) + data[12:]


def with_broken_header(data: bytes) -> bytes:
    return data.replace(b'{"version"', b'["version"')


def with_extra_header_field(data: bytes) -> bytes:
    return data.replace(b'"observer"', b'"0bserver"')


def with_one_flipped_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def with_an_edited_count(data: bytes) -> bytes:
    return data[:-40] + struct.pack("<Q", 2) + data[-32:]


def without_a_record(data: bytes) -> bytes:
    second = data.index(b"R\x01\x04\x00")
    third = data.index(b"R\x00\x04\x00", second)
    return data[:second] + data[third:]


def without_trailer(data: bytes) -> bytes:
    return data[:-41]


def with_bytes_appended(data: bytes) -> bytes:
    return data + b"\0"


def forged_fewer_records(data: bytes) -> bytes:
    return resealed(data[:-40] + struct.pack("<Q", 2))


def forged_more_records(data: bytes) -> bytes:
    return resealed(data[:-40] + struct.pack("<Q", 4))


def forged_reordering(data: bytes) -> bytes:
    return resealed(without_a_record(data[:-32]))


def forged_frame(data: bytes) -> bytes:
    return resealed(data[:-32].replace(b'"kind":"Done"', b'"kind":"Gone"'))


def forged_vast_record(data: bytes) -> bytes:
    start = data.index(b"R\x01\x04\x00") + 20
    return resealed(data[:start] + struct.pack("<Q", 1 << 60) + data[start + 8 : -32])


@pytest.mark.parametrize(
    ("tamper", "match"),
    [
        (with_other_magic, "is not a transcript"),
        (with_version_2, "transcript of version 2, not 1"),
        (with_vast_header, r"header of 1073741824 bytes exceeds"),
        (with_broken_header, "header is damaged"),
        (with_extra_header_field, "header is damaged"),
        (with_one_flipped_bit, "was changed after it was written"),
        (with_an_edited_count, "was changed after it was written"),
        (without_a_record, "was changed after it was written"),
        (without_trailer, "truncated or was changed"),
        (with_bytes_appended, "was changed after it was written"),
        (forged_fewer_records, "counts 2 records, and more follow"),
        (forged_more_records, "is truncated"),
        (forged_reordering, "record 1 is damaged"),
        (forged_frame, "record 1: unknown message kind 'Gone'"),
        (forged_vast_record, "record 1 is damaged"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_tampered_transcript_is_refused(tmp_path: Path, tamper: Callable[[bytes], bytes], match: str) -> None:
    path = tmp_path / "owner.trace"
    data = record(path)
    tampered = tamper(data)
    assert tampered != data
    path.write_bytes(tampered)
    with pytest.raises(DataError, match=match):
        list(read_transcript(path, KINDS))


def test_nothing_of_a_changed_transcript_is_given_out(tmp_path: Path) -> None:
    path = tmp_path / "owner.trace"
    path.write_bytes(with_one_flipped_bit(record(path)))
    with pytest.raises(DataError, match="was changed"):
        read_transcript(path, KINDS)  # before the first record is asked for


def test_a_transcript_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "owner.trace"
    data = record(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"truncated|not a transcript"):
            read_transcript(path, KINDS)


def test_a_party_that_was_killed_leaves_a_transcript_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "owner.trace"
    transcript = Transcript(path, "owner")
    talk(*observed_pair(transcript))
    transcript._file.flush()
    with pytest.raises(DataError, match="truncated") as caught:
        read_transcript(path, KINDS)
    assert "killed" in str(caught.value.hint)
    transcript.close()
    assert len(list(read_transcript(path, KINDS))) == 3
