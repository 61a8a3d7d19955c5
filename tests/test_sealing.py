"""Sealed state opens whole, for the right key and purpose, or not at all."""

from __future__ import annotations

import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import flipped
from veiltune.errors import CheckpointError
from veiltune.secrets import MasterSecret
from veiltune.tee import sealing
from veiltune.tee.sealing import CHUNK_BYTES, SealingKey, seal, seal_file, unseal, unseal_file

KEY = SealingKey.for_tests(1)
HEADER = 44
BOX = CHUNK_BYTES + 16
DATA = MasterSecret.for_tests(1).expand("data", 2 * CHUNK_BYTES + 1000)
SEALED = seal(DATA, KEY, "state")


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_a_round_trip_has_the_length_that_the_format_says(size: int) -> None:
    sealed = seal(memoryview(DATA)[:size], KEY, "state")
    assert unseal(sealed, KEY, "state") == DATA[:size]
    assert len(sealed) == HEADER + size + 16 * max(1, -(-size // CHUNK_BYTES))


@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=300), context=st.text(max_size=20))
def test_round_trips(data: bytes, context: str) -> None:
    assert unseal(seal(data, KEY, context), KEY, context) == data


def test_the_same_state_sealed_twice_shares_nothing_but_the_header() -> None:
    again = seal(DATA, KEY, "state")
    assert again[:12] == SEALED[:12] == b"VEILSEAL" + struct.pack("<I", 1)
    assert again[12:44] != SEALED[12:44]
    assert again[44:76] != SEALED[44:76]
    assert DATA[:16] not in SEALED


FIRST, SECOND, LAST = SEALED[HEADER : HEADER + BOX], SEALED[HEADER + BOX : HEADER + 2 * BOX], SEALED[HEADER + 2 * BOX :]
OTHER = seal(DATA[::-1], KEY, "state")
TAMPERED = {
    "empty": b"",
    "header cut": SEALED[: HEADER - 1],
    "header alone": SEALED[:HEADER],
    "not sealed state": b"GGUF" + SEALED[4:],
    "another version": SEALED[:8] + struct.pack("<I", 2) + SEALED[12:],
    "salt flipped": flipped(SEALED, 20),
    "first chunk flipped": flipped(SEALED, HEADER),
    "tag flipped": flipped(SEALED, HEADER + BOX - 1),
    "last byte flipped": flipped(SEALED, len(SEALED) - 1),
    "cut by a byte": SEALED[:-1],
    "cut at a chunk's edge": SEALED[: HEADER + 2 * BOX],
    "cut inside a chunk": SEALED[: HEADER + BOX + 100],
    "a byte added": SEALED + b"\0",
    "a chunk added": SEALED + LAST,
    "first chunk missing": SEALED[:HEADER] + SECOND + LAST,
    "middle chunk missing": SEALED[:HEADER] + FIRST + LAST,
    "chunks swapped": SEALED[:HEADER] + SECOND + FIRST + LAST,
    "chunk repeated": SEALED[:HEADER] + FIRST + FIRST + LAST,
    "chunk of another file": SEALED[:HEADER] + OTHER[HEADER : HEADER + BOX] + SECOND + LAST,
    "header of another file": OTHER[:HEADER] + SEALED[HEADER:],
}


@pytest.mark.parametrize("sealed", TAMPERED.values(), ids=TAMPERED.keys())
def test_tampering_is_refused(sealed: bytes) -> None:
    assert SEALED[:HEADER] + FIRST + SECOND + LAST == SEALED
    with pytest.raises(CheckpointError) as caught:
        unseal(sealed, KEY, "state")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("key", "context"), [(KEY, "another state"), (KEY, ""), (SealingKey.for_tests(2), "state")], ids=str
)
def test_another_key_or_context_does_not_open_it(key: SealingKey, context: str) -> None:
    with pytest.raises(CheckpointError, match="does not open"):
        unseal(SEALED, key, context)


def test_a_master_secret_does_not_serve_as_a_sealing_key_by_accident() -> None:
    assert SealingKey.for_tests(1).reveal() != MasterSecret.for_tests(1).reveal()


# ---- files ----------------------------------------------------------------------------------------------------------

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3).T,  # not contiguous
    "b": torch.tensor(7),
    "c": torch.ones(3, dtype=torch.bfloat16, requires_grad=True),
    "d": torch.zeros(0, 4, dtype=torch.float64),
}


def test_a_file_gives_back_tensors_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "state.sealed"
    seal_file(path, TENSORS, {"step": "40"}, KEY, "step-40")
    tensors, metadata = unseal_file(path, KEY, "step-40")
    assert metadata == {"step": "40"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor.detach())
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"step" not in path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["state.sealed"]


def test_a_file_without_tensors_or_metadata(tmp_path: Path) -> None:
    seal_file(tmp_path / "x", {}, {}, KEY, "x")
    assert unseal_file(tmp_path / "x", KEY, "x") == ({}, {})


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.sealed"
    seal_file(path, {"a": torch.ones(1)}, {}, KEY, "s")
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sealing.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        seal_file(path, {"a": torch.zeros(1)}, {}, KEY, "s")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["state.sealed"]


@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[:-1], lambda raw: flipped(raw, 60), lambda raw: raw + b"\0"],
    ids=["cut", "flipped", "longer"],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "state.sealed"
    seal_file(path, TENSORS, {}, KEY, "s")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"state\.sealed does not open"):
        unseal_file(path, KEY, "s")


def test_a_missing_file_and_another_context_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no sealed file"):
        unseal_file(tmp_path / "none", KEY, "s")
    seal_file(tmp_path / "x", TENSORS, {}, KEY, "step-1")
    with pytest.raises(CheckpointError, match="does not open"):
        unseal_file(tmp_path / "x", KEY, "step-2")


# ---- the simulated sealing key --------------------------------------------------------------------------------------


def test_the_simulated_key_is_kept_private_and_found_again(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    with ThreadPoolExecutor(4) as pool:
        keys = list(pool.map(lambda _: SealingKey.load_or_create(home).reveal(), range(8)))
    assert set(keys) == {SealingKey.load_or_create(home).reveal()}
    [path] = home.iterdir()
    assert "simulated" in path.name
    assert path.stat().st_mode & 0o777 == 0o600
    assert SealingKey.load_or_create(tmp_path).reveal() != keys[0]


def test_a_key_file_that_others_may_read_or_that_is_torn_is_refused(tmp_path: Path) -> None:
    SealingKey.load_or_create(tmp_path)
    path = tmp_path / sealing.SIMULATED_KEY_FILE
    path.chmod(0o640)
    with pytest.raises(CheckpointError, match="read by others") as caught:
        SealingKey.load_or_create(tmp_path)
    assert "chmod 600" in str(caught.value.hint)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="5 bytes"):
        SealingKey.load_or_create(tmp_path)
