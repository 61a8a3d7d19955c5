"""Frames: every field kind survives, and every malformation is named."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from veiltune.errors import FrameError
from veiltune.transport import codec, fields, frame
from veiltune.transport.codec import decode, encode
from veiltune.transport.messages import MESSAGES, JsonObject, Message


@dataclass(frozen=True, slots=True)
class Everything(Message):
    whole: int
    real: float
    flag: bool
    text: str
    raw: bytes
    tensor: Tensor
    maybe: Tensor | None
    count: int | None
    label: str | None
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]
    factors: dict[str, Tensor]
    config: JsonObject


@dataclass(frozen=True, slots=True)
class Nothing(Message):
    pass


@dataclass(frozen=True, slots=True)
class Pair(Message):
    step: int
    first: Tensor
    second: Tensor


@dataclass(frozen=True, slots=True)
class Positive(Message):
    step: int

    def __post_init__(self) -> None:
        if self.step <= 0:
            raise ValueError(f"step {self.step}")


KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in (Everything, Nothing, Pair, Positive)}
DTYPES = [dtype for name, dtype in codec._DTYPES.items() if name != "bytes"]


def same(a: Any, b: Any) -> bool:
    """Equal in type and, for tensors and floats, in every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        a, b = ((t.dtype, t.shape, bytes(codec._bytes_of(t.contiguous()))) for t in (a, b))
    elif isinstance(a, float):
        a, b = (struct.pack("<d", math.nan if math.isnan(x) else x) for x in (a, b))
    elif isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    elif isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    elif dataclasses.is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))
    return bool(a == b)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any dtype, rank 0 to 4, empty sides included, any bits, contiguous or not."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    size = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


ints = st.integers(fields.MIN_INT, fields.MAX_INT)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | ints | st.floats() | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
everything = st.builds(
    Everything,
    whole=ints,
    real=st.floats(),
    flag=st.booleans(),
    text=names,
    raw=st.binary(max_size=80),
    tensor=tensors(),
    maybe=st.none() | tensors(),
    count=st.none() | ints,
    label=st.none() | names,
    names=st.lists(names, max_size=3).map(tuple),
    sizes=st.lists(ints, max_size=3).map(tuple),
    outputs=st.lists(tensors(), max_size=3).map(tuple),
    gradients=st.lists(st.none() | tensors(), max_size=3).map(tuple),
    factors=st.dictionaries(names, tensors(), max_size=3),
    config=st.dictionaries(names, json_values, max_size=3),
)


def sample() -> Everything:
    return Everything(
        *(7, 0.5, True, "naïve", b"raw", torch.arange(6.0).view(2, 3), torch.tensor([True, False]), None, "x"),
        names=("q", "v"),
        sizes=(3, -1),
        outputs=(torch.ones(3, dtype=torch.bfloat16),),
        gradients=(None, torch.tensor(2.0)),
        factors={"a": torch.zeros(0, 4), "b": torch.ones(2, dtype=torch.int64)},
        config={"rank": 8, "nested": {"list": [1, 2.0, None]}},
    )


def build(header: Any, payload: bytes = b"", **preamble: Any) -> bytes:
    """A frame with any header, well-formed or not, and any lengths in its preamble."""
    text = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-(16 + len(text)) % 64)
    fixed = {"magic": b"VTN1", "header_bytes": len(text), "payload_bytes": len(payload)} | preamble
    return struct.pack("<4sIQ", *fixed.values()) + text + payload


def pair_header(**changes: Any) -> dict[str, Any]:
    """The header of a Pair of a float32 tensor of shape (2, 3) and an int64 one of shape (2,)."""
    header = {
        "kind": "Pair",
        "fields": {"step": 1, "first": 0, "second": 1},
        "blobs": [["float32", [2, 3], 0, 24], ["int64", [2], 64, 16]],
    }
    return header | changes


PAIR_PAYLOAD = bytes(range(24)) + bytes(40) + bytes(16)


def refused(data: bytes, match: str) -> None:
    for copy in (True, False):
        with pytest.raises(FrameError, match=match):
            decode(bytearray(data), KINDS, copy=copy)


# --- what survives ----------------------------------------------------------------------------------------------------


@given(everything)
def test_every_field_kind_survives_bit_by_bit(message: Everything) -> None:
    laid_out = encode(message)
    data = laid_out.to_bytes()
    assert len(data) == laid_out.num_bytes
    assert same(decode(data, KINDS), message)
    assert same(decode(bytearray(data), KINDS, copy=False), message)
    assert encode(decode(data, KINDS)).to_bytes() == data


def test_a_message_without_fields_survives() -> None:
    assert decode(encode(Nothing()).to_bytes(), KINDS) == Nothing()


def test_the_hand_written_frame_is_what_the_encoder_writes() -> None:
    first = torch.frombuffer(bytearray(range(24)), dtype=torch.float32).view(2, 3)
    data = build(json.dumps(pair_header(), separators=(",", ":")).encode(), PAIR_PAYLOAD)
    assert encode(Pair(1, first, torch.zeros(2, dtype=torch.int64))).to_bytes() == data


def test_every_message_of_the_protocol_can_be_encoded() -> None:
    for kind in MESSAGES.values():
        assert len(fields.plan(kind)) == len(dataclasses.fields(kind))


def test_a_tensor_that_needs_a_gradient_is_sent_by_value() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    message = decode(encode(Pair(1, weight, weight.t()[1:])).to_bytes(), KINDS)
    assert isinstance(message, Pair)
    assert not message.first.requires_grad
    assert torch.equal(message.first, weight)
    assert torch.equal(message.second, weight.t()[1:])


def test_decoded_tensors_own_writable_memory_unless_told() -> None:
    data = bytearray(encode(Pair(1, torch.zeros(3), torch.zeros(3))).to_bytes())
    own, adopted = decode(data, KINDS), decode(data, KINDS, copy=False)
    assert isinstance(own, Pair)
    assert isinstance(adopted, Pair)
    own.first.fill_(5)
    assert not any(data[-12:])
    assert not own.second.any()
    assert own.first.untyped_storage().nbytes() == 12
    adopted.second.fill_(1)
    assert data[-12:] == struct.pack("<3f", 1, 1, 1)
    with pytest.raises(ValueError, match="read-only"):
        decode(bytes(data), KINDS, copy=False)


# --- what cannot be sent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param({"whole": True}, r"Everything\.whole: expected int, got bool", id="bool-for-int"),
        pytest.param({"whole": 1.0}, r"whole: expected int, got float", id="float-for-int"),
        pytest.param({"whole": 1 << 63}, r"whole: .* 64 bits", id="int-too-large"),
        pytest.param({"flag": 1}, r"flag: expected bool, got int", id="int-for-bool"),
        pytest.param({"real": "1"}, r"real: expected float, got str", id="str-for-float"),
        pytest.param({"text": b"x"}, r"text: expected str, got bytes", id="bytes-for-str"),
        pytest.param({"text": "\ud800"}, r"Everything: .*surrogate", id="lone-surrogate"),
        pytest.param({"raw": "x"}, r"raw: expected bytes, got str", id="str-for-bytes"),
        pytest.param({"tensor": [1.0]}, r"tensor: expected Tensor, got list", id="list-for-tensor"),
        pytest.param({"tensor": None}, r"tensor: expected Tensor, got NoneType", id="none-for-tensor"),
        pytest.param({"tensor": torch.zeros(1, dtype=torch.complex64)}, r"tensor: .*complex64", id="complex"),
        pytest.param({"tensor": torch.zeros(1, device="meta")}, r"tensor: .*meta", id="meta"),
        pytest.param({"tensor": torch.zeros(2, 2).to_sparse()}, r"tensor: .*sparse", id="sparse"),
        pytest.param({"names": ["q"]}, r"names: expected tuple, got list", id="list-for-tuple"),
        pytest.param({"factors": {1: torch.zeros(1)}}, r"factors: .*names of type str", id="int-name"),
        pytest.param({"config": {"a": {1: 2}}}, r"config: a name .* not a str", id="json-int-name"),
        pytest.param({"config": {"a": object()}}, r"config: expected int, got object", id="json-object"),
        pytest.param({"sizes": (0,) * (frame.MAX_HEADER_ITEMS + 1)}, r"items exceeds", id="too-many-items"),
        pytest.param({"text": "x" * frame.MAX_HEADER_BYTES}, r"Everything: a header of .* exceeds", id="too-long"),
    ],
)
def test_the_encoder_refuses(change: dict[str, Any], match: str) -> None:
    message = dataclasses.replace(sample())
    for name, value in change.items():
        object.__setattr__(message, name, value)  # past the run-time type checks, as an unchecked caller would
    with pytest.raises(FrameError, match=match):
        encode(message)


def test_deep_json_is_refused_both_ways() -> None:
    depth = fields.MAX_JSON_DEPTH - 2  # the object itself and the number at the bottom are levels too
    deepest = json.loads("[" * depth + "0" + "]" * depth)
    config = {"a": deepest}
    header = {"kind": "Config", "fields": {"config": {"a": [deepest]}}, "blobs": []}
    kinds: dict[str, type[Message]] = {"Config": Config}
    assert decode(encode(Config(config)).to_bytes(), kinds) == Config(config)
    with pytest.raises(FrameError, match=r"Config\.config: .* deeper than 32"):
        encode(Config({"a": [deepest]}))
    with pytest.raises(FrameError, match=r"Config\.config: .* deeper than 32"):
        decode(build(header), kinds)


@dataclass(frozen=True, slots=True)
class Config(Message):
    config: JsonObject


def test_an_error_never_quotes_a_private_value() -> None:
    header = {"kind": "Positive", "fields": {"step": "patient Smith"}, "blobs": []}
    with pytest.raises(FrameError) as caught:
        decode(build(header), KINDS)
    assert "Smith" not in f"{caught.value} {caught.value.hint}"
    with pytest.raises(FrameError, match="Positive: the class refuses these values") as caught:
        decode(build({"kind": "Positive", "fields": {"step": -31337}, "blobs": []}), KINDS)
    assert caught.value.__cause__ is None


def test_an_annotation_that_frames_do_not_carry_is_a_programming_error() -> None:
    @dataclass(frozen=True, slots=True)
    class Strange(Message):
        values: list[int]

    with pytest.raises(TypeError, match="cannot be annotated"):
        encode(Strange([1]))


# --- malformed frames, one by one -------------------------------------------------------------------------------------


def test_the_unchanged_hand_written_frame_is_accepted() -> None:
    message = decode(build(pair_header(), PAIR_PAYLOAD), KINDS)
    assert isinstance(message, Pair)
    assert message.first.shape == (2, 3)


@pytest.mark.parametrize(
    ("preamble", "match"),
    [
        pytest.param({"magic": b"PK\x03\x04"}, "begins with", id="magic"),
        pytest.param({"magic": b"VTN2"}, "begins with b'VTN2'", id="version"),
        pytest.param({"header_bytes": 0}, "header of 0 bytes", id="no-header"),
        pytest.param({"header_bytes": 49}, "does not end at a multiple", id="unaligned-header"),
        pytest.param({"header_bytes": (16 << 20) + 48}, r"header of \d+ bytes exceeds", id="header-too-long"),
        pytest.param({"payload_bytes": (8 << 30) + 1}, r"payload of \d+ bytes exceeds", id="payload-too-long"),
        pytest.param({"payload_bytes": 79}, "1 trailing bytes", id="payload-shorter"),
        pytest.param({"payload_bytes": 81}, "truncated: 1 bytes", id="payload-longer"),
    ],
)
def test_a_wrong_preamble_is_refused(preamble: dict[str, Any], match: str) -> None:
    refused(build(pair_header(), PAIR_PAYLOAD, **preamble), match)


def test_the_payload_limit_is_the_callers() -> None:
    data = build(pair_header(), PAIR_PAYLOAD)
    decode(data, KINDS, max_payload_bytes=80)
    with pytest.raises(FrameError, match="payload of 80 bytes exceeds the limit of 79"):
        decode(data, KINDS, max_payload_bytes=79)


def test_truncation_at_every_byte_and_trailing_bytes_are_refused() -> None:
    data = encode(sample()).to_bytes()
    for length in range(len(data)):
        with pytest.raises(FrameError, match="truncated"):
            decode(data[:length], KINDS)
    refused(data + b"\0", "1 trailing bytes")


FLOAT, LONG = ["float32", [2, 3], 0, 24], ["int64", [2], 64, 16]


@pytest.mark.parametrize(
    ("blobs", "match"),
    [
        pytest.param([["object", [2, 3], 0, 24], LONG], r"blob 0: dtype 'object'", id="dtype"),
        pytest.param([["complex64", [3], 0, 24], LONG], r"dtype 'complex64'", id="complex"),
        pytest.param([[None, [2, 3], 0, 24], LONG], r"dtype a NoneType", id="dtype-none"),
        pytest.param([["bytes", [24], 0, 24], LONG], r"Pair\.first: expected a tensor", id="bytes-for-tensor"),
        pytest.param([["bytes", [2, 12], 0, 24], LONG], r"bytes have one dimension", id="bytes-2d"),
        pytest.param([["float32", [2, 4], 0, 24], LONG], r"blob 0: 24 bytes for shape \[2, 4\]", id="shape"),
        pytest.param([["float32", [-2, -3], 0, 24], LONG], r"is not a shape", id="negative-shape"),
        pytest.param([["float32", [True, 6], 0, 24], LONG], r"is not a shape", id="bool-shape"),
        pytest.param([["float32", [2.0, 3], 0, 24], LONG], r"is not a shape", id="float-shape"),
        pytest.param([["float32", [0, 1 << 62, 1 << 62], 0, 0], LONG], r"is not a shape", id="empty-but-vast"),
        pytest.param([["float32", [1 << 62, 4], 0, 24], LONG], r"is not a shape", id="vast"),
        pytest.param([["float32", [1] * 17, 0, 4], LONG], r"at most 16", id="too-many-dimensions"),
        pytest.param([["float32", 6, 0, 24], LONG], r"at most 16", id="shape-no-list"),
        pytest.param([["float32", [2, 3], 0, 24.0], LONG], r"a float bytes for shape", id="float-size"),
        pytest.param([FLOAT, ["int64", [2], 0, 16]], r"blob 1 is at 0, not at 64", id="overlap"),
        pytest.param([FLOAT, ["int64", [2], 24, 16]], r"blob 1 is at 24", id="unaligned"),
        pytest.param([FLOAT, ["int64", [2], 128, 16]], r"blob 1 is at 128", id="gap"),
        pytest.param([FLOAT, ["int64", [2], -64, 16]], r"blob 1 is at -64", id="negative-offset"),
        pytest.param([FLOAT, ["int64", [3], 64, 24]], r"blob 1 ends at 88, beyond a payload of 80", id="out-of-range"),
        pytest.param([FLOAT, ["int64", [1], 64, 8]], r"payload has 8 trailing bytes", id="uncovered"),
        pytest.param([FLOAT], r"payload has 56 trailing bytes", id="blob-missing"),
        pytest.param([FLOAT, LONG[:3]], r"blob 1 is not \[dtype", id="short-row"),
        pytest.param({"0": FLOAT}, r"blobs a list", id="blobs-no-list"),
    ],
)
def test_a_wrong_table_of_blobs_is_refused(blobs: Any, match: str) -> None:
    refused(build(pair_header(blobs=blobs), PAIR_PAYLOAD), match)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        pytest.param({"step": 1, "first": 0}, r"Pair: field 'second' is missing", id="missing"),
        pytest.param({"step": 1, "first": 0, "second": 1, "third": 2}, r"Pair: unknown field 'third'", id="unknown"),
        pytest.param({"step": 1, "first": 0, "zweite": 1}, r"is missing; unknown field 'zweite'", id="renamed"),
        pytest.param({"step": True, "first": 0, "second": 1}, r"step: expected int, got bool", id="bool-for-int"),
        pytest.param({"step": 1.0, "first": 0, "second": 1}, r"step: expected int, got float", id="float-for-int"),
        pytest.param({"step": float("nan"), "first": 0, "second": 1}, r"expected int, got float", id="nan-for-int"),
        pytest.param({"step": 1 << 64, "first": 0, "second": 1}, r"64 bits", id="large-int"),
        pytest.param({"step": 1, "first": 1, "second": 0}, r"first: expected blob 0 of 2, got 1", id="swapped"),
        pytest.param({"step": 1, "first": 0, "second": 0}, r"second: expected blob 1 of 2, got 0", id="shared"),
        pytest.param({"step": 1, "first": False, "second": 1}, r"first: expected blob 0", id="bool-for-blob"),
        pytest.param({"step": 1, "first": None, "second": 0}, r"first: expected blob 0", id="none-for-tensor"),
        pytest.param([1, 0, 1], r"fields must be an object", id="fields-no-object"),
    ],
)
def test_wrong_fields_are_refused(values: Any, match: str) -> None:
    refused(build(pair_header(fields=values), PAIR_PAYLOAD), match)


def test_a_blob_that_no_field_names_is_refused() -> None:
    header = {"kind": "Positive", "fields": {"step": 1}, "blobs": [["float32", [1], 0, 4]]}
    refused(build(header, bytes(4)), "1 blobs belong to no field")


@pytest.mark.parametrize(
    ("header", "match"),
    [
        pytest.param(pair_header(kind="Exec"), "unknown message kind 'Exec'", id="unknown-kind"),
        pytest.param(pair_header(kind=["Pair"]), "unknown message kind", id="kind-no-name"),
        pytest.param(pair_header(extra=1), "not an object of kind, fields and blobs", id="extra-key"),
        pytest.param([], "not an object", id="no-object"),
        pytest.param(b"{", "not JSON", id="no-json"),
        pytest.param(b"\xff\xfe{}", "not JSON", id="no-utf8"),
        pytest.param(b'{"kind":"Positive","fields":{"step":1,"step":2},"blobs":[]}', "not JSON", id="name-twice"),
        pytest.param(b'{"kind":"Positive\\ud800","fields":{},"blobs":[]}', "not JSON", id="surrogate"),
        pytest.param(b'{"kind":"Nothing","fields":{},"blobs":[]} x', "followed by something", id="text-after"),
        pytest.param(b'{"kind":"Nothing","fields":{},"blobs":[]}' + b" " * 64, "followed by", id="too-much-padding"),
        pytest.param(b"[" * 200_000, "not JSON", id="nested-too-deep"),
        pytest.param(b"[" * 300_000, "300000 items exceeds", id="too-many-items"),
        pytest.param(b'{"kind":"Positive","fields":{"step":' + b"9" * 5000 + b'},"blobs":[]}', "not JSON", id="digits"),
    ],
)
def test_a_wrong_header_is_refused(header: Any, match: str) -> None:
    refused(build(header, b"" if isinstance(header, bytes) else PAIR_PAYLOAD), match)


def test_padding_that_is_not_zero_is_refused() -> None:
    payload = bytearray(PAIR_PAYLOAD)
    payload[40] = 1
    refused(build(pair_header(), bytes(payload)), "padding before blob 1")


def test_a_boolean_that_is_neither_is_refused() -> None:
    header = pair_header(blobs=[["bool", [24], 0, 24], LONG])
    assert decode(build(header, bytes([1, 0] * 12) + PAIR_PAYLOAD[24:]), KINDS)
    refused(build(header, PAIR_PAYLOAD), "blob 0 holds a boolean that is neither")


# --- fuzzing ----------------------------------------------------------------------------------------------------------


def _flip(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _flip_head(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(16)] = draw.randrange(256)


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def _splice(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    data[start : start + draw.randrange(9)] = draw.randbytes(draw.randrange(9))


def _digit(data: bytearray, draw: random.Random) -> None:
    digits = [index for index, byte in enumerate(data[:600]) if 48 <= byte <= 57]
    data[draw.choice(digits)] = draw.choice(b"0123456789-.e")


@pytest.mark.parametrize("mutate", [_flip, _flip_head, _cut, _splice, _digit], ids=lambda mutate: mutate.__name__)
def test_a_mutated_frame_gives_a_message_or_a_frame_error_and_takes_no_memory(
    mutate: Callable[[bytearray, random.Random], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode(sample()).to_bytes()
    draw = random.Random(mutate.__name__)
    allocated: list[int] = []
    empty = torch.empty

    def spy(*args: Any, **options: Any) -> Tensor:
        tensor = empty(*args, **options)
        allocated.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "empty", spy)
    decode(whole, KINDS)
    assert sum(allocated) > 0
    errors = 0
    for _ in range(200):
        data = bytearray(whole)
        mutate(data, draw)
        allocated.clear()
        try:
            decode(bytes(data), KINDS)
        except FrameError:
            errors += 1
        assert sum(allocated) <= len(data)
    assert errors > 20
