"""A sealed container opens for its recipients, tensor by tensor and to the byte, and any tampering with it is refused."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers import flipped, model_directory, scratch
from veiltune.errors import CheckpointError, ConfigError, DataError, ModelError, VeiltuneError
from veiltune.secrets import MasterSecret
from veiltune.tee import sealing
from veiltune.tee.container import (
    Container,
    DataKey,
    Recipient,
    RecipientKey,
    add_recipient,
    files,
    layout,
    load_recipient,
    load_recipient_key,
    make_recipient_key,
    open_container,
    seal,
    unseal,
    wrapping,
    writing,
)
from veiltune.tee.container.layout import HEAD_BYTES, MAX_INDEX_BYTES, Index, Prologue
from veiltune.tee.sealing import CHUNK_BYTES, SealingKey

KEY = RecipientKey("enclave")
OTHER = RecipientKey("owner")
LOCAL = SealingKey.for_tests(1)
BOX = CHUNK_BYTES + 16
RANDOM = MasterSecret.for_tests(1).expand("container", 2 * CHUNK_BYTES + 5000)


def sealed_file(directory: Path, content: bytes, name: str = "data.jsonl", **options: Any) -> Path:
    """A container of one file, for `KEY`, `OTHER` and `LOCAL`."""
    plain, target = directory / name, directory / f"{name}.sealed"
    plain.write_bytes(content)
    seal(plain, target, [KEY.recipient, OTHER.recipient, LOCAL], purpose="data", **options)
    return target


def opened(path: Path, key: Any = KEY, **options: Any) -> Container:
    options = {"purpose": "data", **options}
    return open_container(path, key, **options)


def everything(path: Path, key: Any = KEY, **options: Any) -> dict[str, bytes]:
    """Open a container and read all of it, the tensors by themselves too."""
    with opened(path, key, **options) as container:
        for name in container.tensors:
            container.tensor(name)
        return {name: container.read(name) for name in container.files}


@cache
def model_container() -> Path:
    target = scratch() / "model.sealed"
    seal(Path(model_directory("llama-tied-biased")), target, [KEY.recipient])
    return target


@contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, error: BaseException
) -> Generator[None, None, None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        yield


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama-tied-biased", "gpt2"])
def test_a_checkpoint_opens_tensor_by_tensor_and_unseals_to_the_byte(model: str, tmp_path: Path) -> None:
    source = Path(model_directory(model))
    done: list[tuple[int, int]] = []
    sealed = seal(source, tmp_path / "m", [KEY.recipient], lambda now, total: done.append((now, total)))
    expected = {name: value for path in sorted(source.glob("*.safetensors")) for name, value in load_file(path).items()}
    assert set(sealed.files) == {path.name for path in source.iterdir()} > {"config.json", "tokenizer.json"}
    assert sealed.left_out == ()
    assert sealed.num_tensors == len(expected)
    assert sealed.num_bytes == sealed.path.stat().st_size
    assert done[-1] == (sealed.plain_bytes, sealed.plain_bytes)
    assert sealed.path.stat().st_mode & 0o777 == 0o600
    with open_container(sealed.path, KEY) as container:
        assert container.names == (*sealed.files, *container.tensors)
        assert container.tensors.keys() == expected.keys()
        for name in reversed(list(expected)):
            assert container.tensors[name].shape == tuple(expected[name].shape)
            assert torch.equal(container.tensor(name), expected[name])
        assert container.read("config.json") == (source / "config.json").read_bytes()
    assert unseal(sealed.path, KEY, tmp_path / "back") == sealed.files
    for name in sealed.files:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert unseal(sealed.path, KEY, tmp_path / "small", only=["config.json"]) == ("config.json",)
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["config.json"]
    content = sealed.path.read_bytes()
    assert b"lm_head" not in content
    assert b"layers" not in content


def test_every_dtype_and_the_empty_and_the_scalar_tensor_come_back(tmp_path: Path) -> None:
    def draw(dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(0, 2, (3, 5 * dtype.itemsize), dtype=torch.uint8).view(dtype)

    tensors = {name: draw(dtype) for name, dtype in layout.DTYPES.items()}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(7.0)}
    save_file(tensors, tmp_path / "all.safetensors")
    seal(tmp_path / "all.safetensors", tmp_path / "x", [LOCAL])
    with open_container(tmp_path / "x", LOCAL) as container:
        for name, tensor in tensors.items():
            found = container.tensor(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


BORDERS = st.one_of(
    st.integers(0, 40), *(st.integers(n * CHUNK_BYTES - 2, n * CHUNK_BYTES + 2) for n in (1, 2)), st.just(len(RANDOM))
)


@settings(max_examples=15)
@given(sizes=st.lists(BORDERS, min_size=1, max_size=3))
def test_tensors_of_any_size_over_chunk_borders(sizes: list[int]) -> None:
    directory = scratch() / "borders"
    directory.mkdir(exist_ok=True)
    tensors = {
        f"t{number}": torch.frombuffer(bytearray(RANDOM), dtype=torch.uint8)[number:][:size].clone()
        for number, size in enumerate(sizes)
    }
    save_file(tensors, directory / "t.safetensors")
    seal(directory / "t.safetensors", directory / "t.sealed", [KEY.recipient], overwrite=True)
    chunks = sum(max(1, -(-len(tensor) // CHUNK_BYTES)) for tensor in tensors.values()) + 1
    plain = (directory / "t.safetensors").read_bytes()
    with open_container(directory / "t.sealed", KEY) as container:
        index_bytes = container._binding.prologue.index_bytes
        assert (directory / "t.sealed").stat().st_size == HEAD_BYTES + index_bytes + len(plain) + 16 * chunks
        for name, tensor in tensors.items():
            assert torch.equal(container.tensor(name), tensor)
        assert container.read("t.safetensors") == plain


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, len(RANDOM)])
def test_a_data_set_comes_back_in_verified_chunks(size: int, tmp_path: Path) -> None:
    path = sealed_file(tmp_path, RANDOM[:size])
    for key in (KEY, OTHER, LOCAL):
        assert everything(path, key) == {"data.jsonl": RANDOM[:size]}
    with opened(path) as container:
        assert all(len(chunk) <= CHUNK_BYTES for chunk in container.chunks("data.jsonl"))
    assert unseal(path, OTHER, tmp_path / "back", purpose="data") == ("data.jsonl",)
    assert (tmp_path / "back").read_bytes() == RANDOM[:size]


def test_the_same_file_sealed_twice_shares_nothing(tmp_path: Path) -> None:
    first = sealed_file(tmp_path, RANDOM).read_bytes()
    again = sealed_file(tmp_path, RANDOM, overwrite=True).read_bytes()
    assert first[:12] == again[:12] == b"VEILCONT\x01\0\0\0"
    assert first[12:76] != again[12:76]
    for start in range(HEAD_BYTES, len(first) - 32, 4096):
        assert first[start : start + 16] != again[start : start + 16]


def test_a_tensor_is_opened_without_the_others(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(1000), "b": torch.full((1000,), 2.0), "c": torch.ones(10)}, path)
    seal(path, tmp_path / "x", [KEY.recipient])
    raw = (tmp_path / "x").read_bytes()
    with open_container(tmp_path / "x", KEY) as container:
        at = place(container, "b")
    (tmp_path / "x").write_bytes(flipped(raw, at))
    with open_container(tmp_path / "x", KEY) as container:
        assert torch.equal(container.tensor("a"), torch.ones(1000))
        assert torch.equal(container.tensor("c"), torch.ones(10))
        with pytest.raises(CheckpointError, match="chunk 0 of 'b'"):
            container.tensor("b")
        with pytest.raises(CheckpointError, match="altered or moved"):
            container.read("t.safetensors")
    with pytest.raises(CheckpointError, match="altered or moved"):
        unseal(tmp_path / "x", KEY, tmp_path / "back")
    assert {each.name for each in tmp_path.iterdir()} == {"t.safetensors", "x"}


def test_reading_and_writing_hold_a_few_chunks_whatever_the_size(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(24 << 20)
    tracemalloc.start()
    try:
        seal(tmp_path / "big", tmp_path / "x", [KEY.recipient])
        unseal(tmp_path / "x", KEY, tmp_path / "back")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * CHUNK_BYTES
    assert (tmp_path / "back").stat().st_size == 24 << 20


# --- tampering --------------------------------------------------------------------------------------------------------


def place(container: Container, name: str) -> int:
    """Where an entry of an open container begins in its file."""
    [entry] = [entry for _, entry in container._index.entries() if entry.name == name]
    return HEAD_BYTES + container._binding.prologue.index_bytes + entry.offset


@pytest.fixture(scope="module")
def whole() -> tuple[bytes, int]:
    """A container of three chunks, and where the first begins."""
    directory = scratch() / "whole"
    directory.mkdir()
    path = sealed_file(directory, RANDOM)
    with opened(path) as container:
        return path.read_bytes(), place(container, "data.jsonl")


def refused(raw: bytes, directory: Path, key: Any = KEY) -> str:
    """Raise if a container is not refused; what the error says otherwise."""
    (directory / "tampered").write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        everything(directory / "tampered", key)
    assert caught.value.hint
    return caught.value.message


def test_every_byte_of_the_head_counts(tmp_path: Path) -> None:
    """Those of a wrapped key for the recipient whose it is, all others for everybody."""
    path = sealed_file(tmp_path, b"text")
    raw = path.read_bytes()
    for at in range(512):  # the prologue and the first slot, KEY's
        refused(flipped(raw, at), tmp_path)
    for at in range(512, 768):  # OTHER's
        refused(flipped(raw, at), tmp_path, OTHER)
        if 512 + 2 <= at < 512 + 18 + 80:
            assert everything(tmp_path / "tampered") == {"data.jsonl": b"text"}
        else:
            assert "slot 1" in refused(flipped(raw, at), tmp_path)
    for at in range(768, 1024):
        refused(flipped(raw, at), tmp_path, LOCAL)
    for at in (*range(1024, HEAD_BYTES, 97), *range(1024, HEAD_BYTES, 256)):  # an empty one
        assert "altered" in refused(flipped(raw, at), tmp_path)


def test_every_byte_of_the_index_and_of_a_short_entry_counts(tmp_path: Path) -> None:
    path = sealed_file(tmp_path, b"text")
    raw = path.read_bytes()
    start = len(raw) - 20
    for at in range(start, len(raw)):
        assert "chunk 0 of 'data.jsonl'" in refused(flipped(raw, at), tmp_path)
    for at in range(HEAD_BYTES, start):
        assert "index" in refused(flipped(raw, at), tmp_path)


def chunk_changes(raw: bytes, start: int, other: bytes) -> Iterator[tuple[str, bytes]]:
    head, first, second, last = raw[:start], raw[start:][:BOX], raw[start + BOX :][:BOX], raw[start + 2 * BOX :]
    for number, begin in enumerate((start, start + BOX, start + 2 * BOX)):
        end = min(begin + BOX, len(raw))
        yield f"chunk {number} flipped", flipped(raw, begin)
        yield f"middle of chunk {number} flipped", flipped(raw, (begin + end) // 2)
        yield f"tag of chunk {number} flipped", flipped(raw, end - 1)
    yield "swapped", head + second + first + last
    yield "repeated", head + first + first + last
    yield "first dropped", head + second + last
    yield "last dropped", head + first + second
    yield "middle dropped", head + first + last
    yield "last twice", raw + last
    yield "a byte appended", raw + b"\0"
    yield "a byte less", raw[:-1]
    yield "cut in a chunk", raw[: start + BOX + 7]
    yield "cut in the index", raw[: start - 5]
    yield "cut in the slots", raw[:2000]
    yield "cut in the prologue", raw[:100]
    yield "empty", b""
    yield "another's chunk", head + other[start:][:BOX] + second + last
    yield "another's bulk", head + other[start:]
    yield "another's head", other[:HEAD_BYTES] + raw[HEAD_BYTES:]
    yield "another's slots", raw[:256] + other[256:HEAD_BYTES] + raw[HEAD_BYTES:]
    yield "another's prologue", other[:256] + raw[256:]
    yield "another's index", raw[:HEAD_BYTES] + other[HEAD_BYTES:start] + raw[start:]
    yield "an index said to be longer", raw[:76] + (MAX_INDEX_BYTES + 1).to_bytes(8, "little") + raw[84:]
    yield "an index said to be beyond the end", raw[:76] + MAX_INDEX_BYTES.to_bytes(8, "little") + raw[84:]


def test_chunks_that_are_altered_moved_missing_or_added(whole: tuple[bytes, int], tmp_path: Path) -> None:
    raw, start = whole
    other = sealed_file(tmp_path, RANDOM).read_bytes()
    assert len(other) == len(raw)
    (tmp_path / "same").write_bytes(raw)
    assert everything(tmp_path / "same") == {"data.jsonl": RANDOM}
    for what, changed in chunk_changes(raw, start, other):
        assert changed != raw, what
        refused(changed, tmp_path)


def test_equal_tensors_cannot_be_exchanged_nor_entries_renamed_even_by_a_recipient(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(64), "b": torch.ones(64)}, tmp_path / "t.safetensors")
    seal(tmp_path / "t.safetensors", tmp_path / "x", [KEY.recipient])
    raw = (tmp_path / "x").read_bytes()
    with open_container(tmp_path / "x", KEY) as container:
        a, b, prologue, data_key = place(container, "a"), place(container, "b"), *secrets_of(container)
        plain = container._index.model_dump_json()
    assert b - a == 64 * 4 + 16
    exchanged = raw[:a] + raw[b : b + b - a] + raw[a:b] + raw[b + b - a :]
    (tmp_path / "x").write_bytes(exchanged)
    with open_container(tmp_path / "x", KEY) as container:
        for name in "ab":
            with pytest.raises(CheckpointError, match="moved"):
                container.tensor(name)
    renamed = plain.replace('"a"', '"?"').replace('"b"', '"a"').replace('"?"', '"b"')
    index = Index.model_validate_json(renamed).seal(data_key, prologue)
    (tmp_path / "x").write_bytes(raw[:HEAD_BYTES] + index + raw[HEAD_BYTES + len(index) :])
    with open_container(tmp_path / "x", KEY) as container:
        assert list(container.tensors) == ["b", "a"]
        with pytest.raises(CheckpointError, match="altered or moved"):
            container.tensor("a")


def secrets_of(container: Container) -> tuple[Prologue, DataKey]:
    return container._binding.prologue, container._key


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a path": lambda index: index["files"][0].update(name="../escape"),
    "the parent": lambda index: index["files"][0].update(name=".."),
    "a terminal's command": lambda index: index["files"][0].update(name="a\x1b[2J"),
    "twice": lambda index: index["files"].append(index["files"][0]),
    "none": lambda index: index["files"].clear(),
    "negative": lambda index: index["files"][0].update(head_bytes=-1),
    "huge": lambda index: index["files"][0].update(head_bytes=10**30),
    "larger than the file": lambda index: index["files"][0].update(head_bytes=10**12),
    "more": lambda index: index.update(more=1),
    "less": lambda index: index.pop("files"),
    "a tensor that does not fit": lambda index: index["files"][0].update(
        tensors=[{"name": "a", "dtype": "F32", "shape": [-1, -4], "num_bytes": 16}]
    ),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_sealer_who_lies_in_the_index_is_refused(lie: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    path = sealed_file(tmp_path, b"text")
    with opened(path) as container:
        prologue, key = secrets_of(container)
        index = container._index.model_dump(mode="json")
    lie(index)
    sealed = sealing.seal(json.dumps(index).encode(), layout._index_key(key, prologue), "container/index/1")
    prologue = dataclasses.replace(prologue, index_bytes=len(sealed))
    raw = path.read_bytes()
    refused(prologue.encode() + raw[256:HEAD_BYTES] + sealed + raw[-20:], tmp_path)


def mutate(raw: bytes, draw: random.Random) -> bytes:
    """A few of: bits flipped, bytes replaced, a piece cut out, doubled, moved or zeroed, the end cut off or extended."""
    value = bytearray(raw)
    for _ in range(draw.randint(1, 3)):
        # half of the changes are in the first 300 bytes, the fields that decide what else is read
        at = draw.randrange(min(300, len(value)) if draw.random() < 0.5 else len(value))
        length = min(draw.choice([1, 2, 8, 64, 1000]), len(value) - at)
        piece = bytes(value[at : at + length])
        match draw.randrange(7):
            case 0:
                value[at] ^= 1 << draw.randrange(8)
            case 1:
                value[at : at + length] = draw.randbytes(length)
            case 2:
                del value[at : at + length]
            case 3:
                value[at:at] = piece
            case 4:
                value[at : at + length] = bytes([draw.choice([0, 255])]) * length
            case 5:
                del value[max(at, 1) :]
            case _:
                value += piece
        value = value or bytearray(b"\0")
    return bytes(value)


def test_a_thousand_mutated_containers_end_in_our_error_or_in_the_right_content(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(300), "b": torch.ones(20, dtype=torch.int64)}, tmp_path / "t.safetensors")
    plain = (tmp_path / "t.safetensors").read_bytes()
    path = tmp_path / "x"
    seal(tmp_path / "t.safetensors", path, [KEY.recipient, OTHER.recipient], purpose="data")
    raw = path.read_bytes()
    assert everything(path) == {"t.safetensors": plain}
    draw = random.Random(1)
    num_refused = slowest = 0.0
    with address_space_bounded(MAX_INDEX_BYTES):
        for _ in range(1000):
            path.write_bytes(mutate(raw, draw))
            begin = time.perf_counter()
            try:
                assert everything(path) == {"t.safetensors": plain}
            except CheckpointError:
                num_refused += 1
            slowest = max(slowest, time.perf_counter() - begin)
    assert num_refused > 900  # the rest changed what is not KEY's: the key in OTHER's slot
    assert slowest < 5.0


@contextmanager
def address_space_bounded(num_bytes: int) -> Generator[None, None, None]:
    """Let this process have no more than so many bytes beyond what it has, where the system can do that."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_bound_on_memory_would_be_noticed() -> None:
    with address_space_bounded(MAX_INDEX_BYTES), pytest.raises(MemoryError):
        bytes(2 * MAX_INDEX_BYTES)


@settings(max_examples=60)
@given(content=st.binary(max_size=6000), prefix=st.sampled_from([0, 12, 76, 256, 512, HEAD_BYTES]))
def test_what_is_no_container_is_refused(content: bytes, prefix: int) -> None:
    path = scratch() / "noise"
    path.write_bytes(model_container().read_bytes()[:prefix] + content)
    with pytest.raises(CheckpointError):
        open_container(path, KEY)


# --- recipients -------------------------------------------------------------------------------------------------------


def test_only_recipients_open_it_and_only_as_what_they_are(tmp_path: Path) -> None:
    digest = bytes(range(32))
    enclave = KEY.bound_to(digest)
    (tmp_path / "plain").write_bytes(b"text")
    path = tmp_path / "x"
    seal(tmp_path / "plain", path, [enclave.recipient], purpose="data")
    assert everything(path, enclave) == {"plain": b"text"}
    for stranger in (OTHER, LOCAL, RecipientKey("enclave")):
        with pytest.raises(CheckpointError, match="not sealed for"):
            opened(path, stranger)
    for same_key in (KEY, KEY.bound_to(digest[::-1])):
        with pytest.raises(CheckpointError, match="does not open"):
            opened(path, same_key)
    with pytest.raises(CheckpointError, match=r"does not open .*'model'"):
        opened(path, enclave, purpose="model")
    with pytest.raises(CheckpointError, match="another container's"):
        opened(path, DataKey.generate())
    with opened(path, enclave) as container:
        assert everything(path, container._key) == {"plain": b"text"}


@pytest.mark.parametrize("field", ["role", "purpose"])
def test_role_and_purpose_are_bound(field: str, tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"text")
    recipient = dataclasses.replace(KEY.recipient, role="host") if field == "role" else KEY.recipient
    seal(tmp_path / "plain", tmp_path / "x", [recipient], purpose="other" if field == "purpose" else "data")
    with pytest.raises(CheckpointError, match="does not open"):
        opened(tmp_path / "x")


def test_a_recipient_is_added_without_touching_the_rest(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(RANDOM)
    path = tmp_path / "x"
    seal(tmp_path / "plain", path, [LOCAL], purpose="data")
    before = path.read_bytes()
    with opened(path, LOCAL) as open_meanwhile:
        add_recipient(path, LOCAL, KEY.recipient, purpose="data")
        assert open_meanwhile.read("plain") == RANDOM
    after = path.read_bytes()
    assert [at for at in range(0, len(before), 256) if before[at : at + 256] != after[at : at + 256]] == [512]
    assert everything(path) == {"plain": RANDOM}
    for _ in range(13):
        add_recipient(path, KEY, OTHER.recipient, purpose="data")
    with pytest.raises(CheckpointError, match="15 recipients"):
        add_recipient(path, KEY, OTHER.recipient, purpose="data")
    with pytest.raises(CheckpointError, match="not sealed for"):
        add_recipient(path, RecipientKey("owner"), OTHER.recipient, purpose="data")
    assert everything(path, OTHER) == {"plain": RANDOM}


def test_a_key_sent_apart_opens_its_container_alone_and_for_its_job_alone(tmp_path: Path) -> None:
    path = tmp_path / "x"
    (tmp_path / "plain").write_bytes(b"text")
    seal(tmp_path / "plain", path, [LOCAL], purpose="data")
    with opened(path, LOCAL) as container:
        wrapped = container.wrap(KEY.recipient, purpose="job 7")
    assert len(wrapped) == 80
    assert everything(path, purpose="job 7", wrapped=wrapped) == {"plain": b"text"}
    assert wrapped not in path.read_bytes()
    bad: list[dict[str, Any]] = [
        {"purpose": "job 8", "wrapped": wrapped},
        {"purpose": "job 7", "wrapped": wrapped[:-1]},
        {"purpose": "job 7", "wrapped": b""},
        {"purpose": "job 7", "wrapped": bytes(80)},
        *({"purpose": "job 7", "wrapped": flipped(wrapped, at)} for at in range(80)),
        {"purpose": "job 7"},
    ]
    for options in bad:
        with pytest.raises(CheckpointError):
            everything(path, **options)
    other = sealed_file(tmp_path, b"text")
    with pytest.raises(CheckpointError):
        everything(other, purpose="job 7", wrapped=wrapped)


def test_two_recipients_cannot_be_given_two_keys(tmp_path: Path) -> None:
    path = sealed_file(tmp_path, b"text")
    raw = path.read_bytes()
    with opened(path) as container:
        binding = container._binding
    slot = wrapping.make_slot(DataKey.generate(), KEY.recipient, binding)
    assert "another container's" in refused(raw[:256] + slot + raw[512:], tmp_path)


def test_key_files_are_private_and_found_again(tmp_path: Path) -> None:
    made = make_recipient_key(tmp_path / "keys", "enclave")
    private, public = tmp_path / "keys" / "enclave.recipient.key", tmp_path / "keys" / "enclave.recipient.toml"
    assert load_recipient(public) == made == load_recipient_key(private).recipient
    assert private.stat().st_mode & 0o777 == 0o600
    assert made.fingerprint in public.read_text(encoding="utf-8")
    before = private.read_bytes()
    with pytest.raises(ConfigError, match="there already"):
        make_recipient_key(tmp_path / "keys", "enclave")
    assert private.read_bytes() == before
    (tmp_path / "plain").write_bytes(b"text")
    seal(tmp_path / "plain", tmp_path / "x", [load_recipient(public)], purpose="data")
    assert everything(tmp_path / "x", load_recipient_key(private)) == {"plain": b"text"}
    private.chmod(0o640)
    with pytest.raises(ConfigError, match="read or changed by others"):
        load_recipient_key(private)
    private.chmod(0o600)
    for content in (b"", before[:-40], before[1:], b"\0" * 100, before.replace(b"enclave", b"../../x")):
        private.write_bytes(content)
        with pytest.raises(ConfigError, match="no recipient's key") as caught:
            load_recipient_key(private)
        assert b"PRIVATE" not in str(caught.value).encode()
    for text in ("", "role = 1", 'role = "host"\npublic_key = "x25519:00"', "\0", 'role = "host"'):
        public.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="names no recipient"):
            load_recipient(public)
    for absent in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError):
            load_recipient(absent)


@pytest.mark.parametrize(
    ("role", "key", "digest"), [("Enclave!", bytes(32), b""), ("host", bytes(31), b""), ("host", bytes(32), b"x")]
)
def test_a_recipient_that_is_none_is_refused(role: str, key: bytes, digest: bytes) -> None:
    with pytest.raises(ConfigError):
        Recipient(role, key, digest)


def test_secrets_stay_out_of_reprs_errors_copies_and_pickles(tmp_path: Path) -> None:
    path = sealed_file(tmp_path, b"text")
    container = opened(path)
    raw = container._key.reveal()
    private = KEY.reveal()
    cipher = layout.EntryCipher(container._key, container._binding.prologue, next(container._index.entries())[1])
    for secret in (container, container._key, KEY, cipher):
        assert "redacted" in repr(secret)
        for spoils in (raw, private):
            assert str(spoils) not in f"{secret} {secret!r}"
            assert spoils.hex() not in f"{secret} {secret!r}"
        for leak in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                leak(secret)
    container.close()
    with pytest.raises(CheckpointError, match="cannot be read"):
        container.read("data.jsonl")
    assert raw not in path.read_bytes()


# --- sources and disks that fail --------------------------------------------------------------------------------------


def test_what_is_no_source_is_refused_by_name(tmp_path: Path) -> None:
    def cause(error: type[VeiltuneError], match: str, source: Path, recipients: list[Any]) -> None:
        with pytest.raises(error, match=match) as caught:
            seal(source, tmp_path / "x", recipients)
        assert caught.value.hint
        assert not (tmp_path / "x").exists()

    to = [KEY.recipient]
    model = tmp_path / "model"
    model.mkdir()
    cause(ModelError, "no safetensors", model, to)
    cause(DataError, "no file or directory", tmp_path / "none", to)
    save_file({"a": torch.ones(9)}, model / "model.safetensors")
    (model / "model.bin").write_bytes(b"pickle")
    (model / "sub").mkdir()
    cause(ConfigError, "0 recipients", model, [])
    cause(ConfigError, "16 recipients", model, 16 * to)
    cause(ConfigError, "not valid", model, [Recipient("host", bytes(32))])
    assert seal(model, tmp_path / "y", to).left_out == ("model.bin", "sub")
    with pytest.raises(ConfigError, match="there already"):
        seal(model, tmp_path / "y", to)
    with pytest.raises(ConfigError, match="there already"):
        unseal(tmp_path / "y", KEY, model)
    with pytest.raises(ConfigError, match=r"no file 'config\.json'"):
        unseal(tmp_path / "y", KEY, tmp_path / "z", only=["config.json"])
    with open_container(tmp_path / "y", KEY) as container, pytest.raises(CheckpointError, match="no tensor 'b'"):
        container.tensor("b")
    save_file({"a": torch.ones(9)}, model / "again.safetensors")
    cause(ModelError, r"'a' is in again.safetensors and in model.safetensors", model, to)
    (model / "again.safetensors").unlink()
    good = (model / "model.safetensors").read_bytes()
    for damage in (
        good[:-1],
        good + b"\0",
        good[:5],
        b"",
        b"\xff" * 16,
        good.replace(b"F32", b"F64"),
        good[:8] + b"[" * 99999,
    ):
        (model / "model.safetensors").write_bytes(damage)
        cause(ModelError, "not a whole safetensors", model, to)


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    for later in (RANDOM[:-1], RANDOM + b"x"):
        plain.write_bytes(RANDOM)

        def change(done: int, _: int, later: bytes = later) -> None:
            if done == CHUNK_BYTES:
                plain.write_bytes(later)

        with pytest.raises(DataError, match="changed while"):
            seal(plain, tmp_path / "x", [LOCAL], change)
        assert [path.name for path in tmp_path.iterdir()] == ["plain"]


@pytest.mark.parametrize("where", ["fsync", "link", "write"])
def test_a_full_disk_is_said_and_leaves_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").write_bytes(RANDOM)
    full = OSError(errno.ENOSPC, "No space left on device")
    module = layout.EntryCipher if where == "write" else files.os
    with (
        failing(monkeypatch, module, "encrypt" if where == "write" else where, full),
        pytest.raises(CheckpointError, match=r"cannot write .*No space left"),
    ):
        seal(tmp_path / "plain", tmp_path / "x", [LOCAL])
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    seal(tmp_path / "plain", tmp_path / "x", [LOCAL])
    if where != "write":
        with failing(monkeypatch, files.os, where, full), pytest.raises(CheckpointError, match="No space left"):
            unseal(tmp_path / "x", LOCAL, tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "x"}


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").write_bytes(RANDOM)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    with pytest.raises(CheckpointError, match=r"needs 0\.002 GB, 0\.000 GB are free"):
        seal(tmp_path / "plain", tmp_path / "x", [LOCAL])


def test_an_interrupted_writing_leaves_the_old_one(tmp_path: Path) -> None:
    path = sealed_file(tmp_path, b"old")

    def interrupt(done: int, _: int) -> None:
        if done > CHUNK_BYTES:
            raise KeyboardInterrupt

    (tmp_path / "data.jsonl").write_bytes(RANDOM)
    with pytest.raises(KeyboardInterrupt):
        seal(tmp_path / "data.jsonl", path, [KEY.recipient], interrupt, purpose="data", overwrite=True)
    assert everything(path) == {"data.jsonl": b"old"}
    model = tmp_path / "m"
    with pytest.raises(KeyboardInterrupt):
        unseal(model_container(), KEY, model, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert {each.name for each in tmp_path.iterdir()} == {"data.jsonl", "data.jsonl.sealed"}


KILLED = """
import os, signal, sys
from pathlib import Path
from veiltune.tee.container import seal
from veiltune.tee.sealing import SealingKey
seal(Path(sys.argv[1]), Path(sys.argv[2]), [SealingKey.for_tests(1)],
     lambda done, total: done > total // 2 and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_killed_writing_leaves_no_container(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(RANDOM)
    ended = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "plain", tmp_path / "x"], check=False)
    assert ended.returncode == -signal.SIGKILL
    [left] = [path for path in tmp_path.iterdir() if path.name != "plain"]
    assert left.name.startswith(".x.")
    assert left.name.endswith(".partial")
    seal(tmp_path / "plain", tmp_path / "x", [LOCAL])
    assert everything(tmp_path / "x", LOCAL, purpose="model") == {"plain": RANDOM}


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "sealing.md").read_text(encoding="utf-8")
    shutil.copytree(model_directory("gpt2"), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})  # noqa: S102 - the project's own words
    for path in (tmp_path / "model").iterdir():
        assert (tmp_path / "model-again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = 256 << 20
    save_file(
        {f"t{n}": torch.randint(0, 256, (size // 8,), dtype=torch.uint8) for n in range(8)}, tmp_path / "t.safetensors"
    )
    clocks = [(time.perf_counter(), time.process_time())]
    seal(tmp_path / "t.safetensors", tmp_path / "x", [LOCAL])
    clocks.append((time.perf_counter(), time.process_time()))
    with open_container(tmp_path / "x", LOCAL) as container:
        for name in container.tensors:
            container.tensor(name)
    clocks.append((time.perf_counter(), time.process_time()))
    with capsys.disabled():
        for what, before, after in zip(("sealed", "opened"), clocks, clocks[1:]):
            wall, cpu = (size / 1e6 / (b - a) for a, b in zip(before, after, strict=True))
            print(f"\n{what}: {wall:.0f} MB/s by the clock, {cpu:.0f} MB per second of processor time")
            assert cpu > 50  # ten times slower than the slowest machine with AES instructions
