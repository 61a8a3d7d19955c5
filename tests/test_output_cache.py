"""The owner's cache of trunk outputs: what went in comes out, within a bound, to nobody without the key."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from veiltune.errors import CheckpointError, ConfigError
from veiltune.parties.output_cache import OutputCache
from veiltune.tee.sealing import CHUNK_BYTES, SealingKey

KEY = SealingKey(bytes(range(32)))
IDS = [5, 0, 2**40, 5]
ROOMY = 1 << 30

both = pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])


def cache(
    directory: Path, *, sealed: bool, fingerprint: str = "f1", max_bytes: int = ROOMY, key: SealingKey = KEY
) -> OutputCache:
    return OutputCache(directory, fingerprint, max_bytes=max_bytes, key=key if sealed else None)


def output(seq: int = 4, width: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(seq, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.exists() else []


def stored(directory: Path, *, sealed: bool) -> Path:
    """The file of the one example in a cache."""
    cache(directory, sealed=sealed).put(IDS, output())
    (path,) = files(directory)
    return path


# ---- keeping --------------------------------------------------------------------------------------------------------


@both
@given(
    ids=st.lists(st.integers(-1, 2**62), max_size=6),
    width=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_what_is_stored_comes_back_as_it_was(
    ids: list[int],
    width: int,
    dtype: torch.dtype,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
    *,
    sealed: bool,
) -> None:
    directory = tmp_path_factory.mktemp("cache") / "new" / "folder"
    hidden = output(len(ids), width, seed, dtype)
    store = cache(directory, sealed=sealed)
    assert store.missing(ids)
    store.put(ids, hidden)
    for again in (store, cache(directory, sealed=sealed)):
        assert not again.missing(ids)
        assert again.missing([*ids, 1])
        back = again.get(ids)
        assert back.dtype == dtype
        assert torch.equal(back, hidden)


@both
def test_another_process_finds_what_one_stored(tmp_path: Path, *, sealed: bool) -> None:
    first = cache(tmp_path, sealed=sealed)
    for number in range(5):
        first.put([number], output(1, seed=number))
    again = cache(tmp_path, sealed=sealed)
    assert len(again) == len(first) == 5
    assert again.num_bytes == first.num_bytes == sum(path.stat().st_size for path in files(tmp_path))
    assert all(torch.equal(again.get([number]), output(1, seed=number)) for number in range(5))


@both
def test_views_and_leaves_are_stored_by_value_and_returned_as_a_copy(tmp_path: Path, *, sealed: bool) -> None:
    store = cache(tmp_path, sealed=sealed)
    leaf = output(6, 4).requires_grad_()
    store.put(IDS, leaf.T[:, :3])
    back = store.get(IDS)
    assert torch.equal(back, leaf.detach().T[:, :3])
    assert not back.requires_grad
    back.zero_()
    assert torch.equal(store.get(IDS), leaf.detach().T[:, :3])


@both
def test_an_example_stored_again_is_replaced(tmp_path: Path, *, sealed: bool) -> None:
    store = cache(tmp_path, sealed=sealed)
    store.put(IDS, output(width=90))
    larger = store.num_bytes
    store.put(IDS, output(seed=1))
    assert torch.equal(store.get(IDS), output(seed=1))
    assert len(store) == len(files(tmp_path)) == 1
    assert store.num_bytes == files(tmp_path)[0].stat().st_size < larger


@both
@pytest.mark.parametrize("other", [[], [1], [1, 2, 3, 0], [2, 1, 3], [1, 2, 3 + 2**32], [1 + 2 * 2**32, 3]])
def test_examples_are_told_apart_by_all_their_ids(tmp_path: Path, other: list[int], *, sealed: bool) -> None:
    store = cache(tmp_path, sealed=sealed)
    store.put([1, 2, 3], output(3))
    assert store.missing(other)
    assert not store.missing([1, 2, 3])


@both
def test_rows_are_tokens(tmp_path: Path, *, sealed: bool) -> None:
    with pytest.raises(ValueError, match="3 rows of trunk output for 4 tokens"):
        cache(tmp_path, sealed=sealed).put(IDS, output(3))
    assert files(tmp_path) == []


@both
def test_clearing_takes_all_that_is_the_caches_and_nothing_else(tmp_path: Path, *, sealed: bool) -> None:
    store = cache(tmp_path, sealed=sealed)
    store.put(IDS, output())
    (tmp_path / "notes.safetensors").write_text("mine")
    store.clear()
    assert [path.name for path in files(tmp_path)] == ["notes.safetensors"]
    assert (len(store), store.num_bytes, store.missing(IDS)) == (0, 0, True)
    store.put(IDS, output())
    assert torch.equal(store.get(IDS), output())


@both
def test_a_cache_that_was_never_written_leaves_no_folder(tmp_path: Path, *, sealed: bool) -> None:
    store = cache(tmp_path / "cache", sealed=sealed)
    store.clear()
    assert len(store) == store.num_bytes == 0
    assert not (tmp_path / "cache").exists()


# ---- the bound ------------------------------------------------------------------------------------------------------


@both
def test_an_output_beyond_the_bound_is_refused_and_leaves_nothing(tmp_path: Path, *, sealed: bool) -> None:
    stored(tmp_path / "measure", sealed=sealed)
    size = files(tmp_path / "measure")[0].stat().st_size
    store = cache(tmp_path / "cache", sealed=sealed, max_bytes=2 * size)
    for number in (1, 2):
        store.put([number] * 4, output())  # exactly full
    assert store.num_bytes == 2 * size
    before = files(tmp_path / "cache")
    with pytest.raises(ConfigError) as caught:
        store.put([3] * 4, output())
    assert f"{3 * size} bytes" in caught.value.message
    assert f"gradfree.cache.max_bytes allows {2 * size}" in caught.value.message
    assert f"gradfree.cache.max_bytes to at least {3 * size}" in str(caught.value.hint)
    assert files(tmp_path / "cache") == before
    assert store.missing([3] * 4)
    store.put([1] * 4, output(seed=1))  # a replacement needs no more room
    assert store.num_bytes == 2 * size


@both
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    width=st.sampled_from([1, 64, 999]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_what_passes_the_check_for_room_fits(
    lengths: list[int], width: int, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory, *, sealed: bool
) -> None:
    """The least bound that passes is enough for all, and not by more than a little a file."""
    directory = tmp_path_factory.mktemp("cache")
    cache(directory, sealed=sealed).put([-1], output(1, width, dtype=dtype))  # something is there already
    with pytest.raises(ConfigError) as caught:
        cache(directory, sealed=sealed, max_bytes=0).require_room(sum(lengths), width, dtype, num_examples=len(lengths))
    needed = int(str(caught.value.hint).split("at least ")[1].split(",")[0])
    store = cache(directory, sealed=sealed, max_bytes=needed)
    store.require_room(sum(lengths), width, dtype, num_examples=len(lengths))
    for number, length in enumerate(lengths):
        store.put([number] * length, output(length, width, dtype=dtype))
    assert needed - 64 * len(lengths) <= store.num_bytes <= needed
    with pytest.raises(ConfigError):
        cache(directory, sealed=sealed, max_bytes=needed - 1).require_room(
            sum(lengths) + 1, width, dtype, num_examples=len(lengths)
        )


@both
def test_the_check_for_room_counts_the_chunks_of_large_outputs(tmp_path: Path, *, sealed: bool) -> None:
    width = CHUNK_BYTES + 1
    with pytest.raises(ConfigError) as caught:
        cache(tmp_path, sealed=sealed, max_bytes=0).require_room(3, width, torch.float32, num_examples=1)
    store = cache(tmp_path, sealed=sealed, max_bytes=int(str(caught.value.hint).split("at least ")[1].split(",")[0]))
    store.put([1, 2, 3], torch.zeros(3, width))
    assert 0 <= store.max_bytes - store.num_bytes <= 64  # 13 chunks have tags of 208 bytes


@both
def test_the_refusal_names_what_to_raise(tmp_path: Path, *, sealed: bool) -> None:
    with pytest.raises(
        ConfigError, match=r"2 examples of 1000 tokens more; gradfree\.cache\.max_bytes allows 99$"
    ) as caught:
        cache(tmp_path, sealed=sealed, max_bytes=99).require_room(1000, 576, torch.float32, num_examples=2)
    assert "set gradfree.cache.max_bytes to at least 2304" in str(caught.value.hint)
    assert files(tmp_path) == []


# ---- whole or not at all --------------------------------------------------------------------------------------------


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


@both
@pytest.mark.parametrize("target", [(os, "fsync"), (Path, "replace")], ids=["write", "rename"])
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: tuple[object, str], *, sealed: bool
) -> None:
    store = cache(tmp_path, sealed=sealed)
    store.put(IDS, output())
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with monkeypatch.context() as patched:
        patched.setattr(*target, failing(OSError(errno.ENOSPC, "No space left on device")))
        for ids in ([7], IDS):
            with pytest.raises(CheckpointError, match="No space left on device") as caught:
                store.put(ids, output(len(ids), seed=1))
            assert str(tmp_path) in caught.value.message
            assert caught.value.hint
    assert {path: path.read_bytes() for path in files(tmp_path)} == before
    assert (len(store), store.missing([7])) == (1, True)
    assert torch.equal(store.get(IDS), output())


@both
def test_an_interruption_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, sealed: bool
) -> None:
    store = cache(tmp_path, sealed=sealed)
    monkeypatch.setattr(os, "fsync", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        store.put(IDS, output())
    assert files(tmp_path) == []
    assert store.missing(IDS)
    assert store.num_bytes == 0


@both
def test_what_a_killed_process_left_is_removed_and_never_read(tmp_path: Path, *, sealed: bool) -> None:
    path = stored(tmp_path, sealed=sealed)
    torn = tmp_path / f".{'0' * 64}.x1_y2.partial"
    torn.write_bytes(path.read_bytes()[:50])
    (tmp_path / ".notes.partial").write_text("mine")
    assert len(cache(tmp_path, sealed=sealed)) == 1
    assert [each.name for each in files(tmp_path)] == [".notes.partial", path.name]


# ---- refusing -------------------------------------------------------------------------------------------------------


def cut(data: bytes) -> bytes:
    return data[:-5]


def emptied(data: bytes) -> bytes:
    return b""


def extended(data: bytes) -> bytes:
    return data + b"\0"


def flipped_in_the_numbers(data: bytes) -> bytes:
    return data[:-30] + bytes([data[-30] ^ 1]) + data[-29:]


def flipped_in_the_header(data: bytes) -> bytes:
    return data[:2] + bytes([data[2] ^ 1]) + data[3:]


def foreign(data: bytes) -> bytes:
    return b"this is not a cached output, but it is about as long as one may be"


@both
@pytest.mark.parametrize(
    "damage", [cut, emptied, extended, flipped_in_the_numbers, flipped_in_the_header, foreign], ids=lambda f: f.__name__
)
def test_a_damaged_file_is_named_and_refused(tmp_path: Path, damage: Callable[[bytes], bytes], *, sealed: bool) -> None:
    store = cache(tmp_path, sealed=sealed)
    store.put(IDS, output())
    (path,) = files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    for attempt in (lambda: store.get(IDS), lambda: cache(tmp_path, sealed=sealed)):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert str(path) in caught.value.message
        assert f"delete '{tmp_path}'" in str(caught.value.hint)


@both
@given(data=st.data())
def test_any_flipped_bit_is_refused_or_changes_nothing(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, *, sealed: bool
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    path = stored(directory, sealed=sealed)
    good = path.read_bytes()
    store = cache(directory, sealed=sealed)
    at, bit = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(good[:at] + bytes([good[at] ^ (1 << bit)]) + good[at + 1 :])
    try:
        read = store.get(IDS)
    except CheckpointError:
        return
    assert not sealed
    assert torch.equal(read, output())


@both
def test_an_absent_file_is_missing_not_damaged(tmp_path: Path, *, sealed: bool) -> None:
    store = cache(tmp_path, sealed=sealed)
    store.put(IDS, output())
    with pytest.raises(CheckpointError, match="no trunk output is stored in ") as caught:
        store.get([1, 2])
    assert "crosses again" in str(caught.value.hint)
    files(tmp_path)[0].unlink()
    assert cache(tmp_path, sealed=sealed).missing(IDS)
    with pytest.raises(CheckpointError, match="no trunk output is stored in "):
        store.get(IDS)


@both
def test_another_runs_cache_is_refused_at_once(tmp_path: Path, *, sealed: bool) -> None:
    path = stored(tmp_path, sealed=sealed)
    said = "another run, example or key" if sealed else "another configuration"
    with pytest.raises(CheckpointError, match=said) as caught:
        cache(tmp_path, sealed=sealed, fingerprint="f2")
    assert str(path) in caught.value.message
    assert "the configuration and key it began with" in str(caught.value.hint)


@both
def test_another_runs_file_among_ones_own_is_refused(tmp_path: Path, *, sealed: bool) -> None:
    for fingerprint in ("f1", "f2"):
        cache(tmp_path / fingerprint, sealed=sealed, fingerprint=fingerprint).put(IDS, output())
    (own,), (others,) = files(tmp_path / "f1"), files(tmp_path / "f2")
    store = cache(tmp_path / "f1", sealed=sealed)
    own.write_bytes(others.read_bytes())
    with pytest.raises(CheckpointError, match="another"):
        store.get(IDS)


@both
def test_a_file_under_another_examples_name_is_refused(tmp_path: Path, *, sealed: bool) -> None:
    store = cache(tmp_path, sealed=sealed)
    store.put(IDS, output())
    (first,) = files(tmp_path)
    store.put([*IDS[::-1], 1], output(5))
    (second,) = {*files(tmp_path)} - {first}
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match="another run, example or key" if sealed else "another example's"):
        store.get(IDS)
    assert torch.equal(store.get([*IDS[::-1], 1]), output(5))


@pytest.mark.parametrize(
    ("first", "said"),
    [(False, "is not sealed, and this cache is to be sealed"), (True, "is sealed, and this cache is not")],
)
def test_sealed_and_plain_files_are_not_mixed(tmp_path: Path, *, first: bool, said: str) -> None:
    """Whoever turns sealing on must learn that plain files lie there still."""
    stored(tmp_path, sealed=first)
    with pytest.raises(CheckpointError, match=said):
        cache(tmp_path, sealed=not first)


def test_other_tensors_in_the_folder_are_refused(tmp_path: Path) -> None:
    path = stored(tmp_path, sealed=False)
    for tensors in ({"hidden": output()}, {"else": output()}):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=path.name):
            cache(tmp_path, sealed=False)


# ---- secrecy --------------------------------------------------------------------------------------------------------


def everything_in(directory: Path) -> bytes:
    return b"\n".join(path.name.encode() + path.read_bytes() for path in files(directory))


@both
def test_a_sealed_cache_holds_nothing_in_the_clear(tmp_path: Path, *, sealed: bool) -> None:
    """What is looked for is found in a plain cache, so the search is able to."""
    store = cache(tmp_path, sealed=sealed, fingerprint="the fingerprint")
    store.put(IDS, output())
    disk = everything_in(tmp_path)
    numbers = [struct.pack("<f", number) for number in output().flatten().tolist()]
    assert sum(number in disk for number in numbers) == (0 if sealed else len(numbers))
    plain_name = hashlib.sha256(struct.pack(f"<{len(IDS)}q", *IDS)).hexdigest().encode()
    assert (plain_name in disk) is not sealed
    assert (b"hidden" in disk) is not sealed
    assert (b"the fingerprint" in disk) is not sealed
    assert struct.pack("<q", IDS[2]) not in disk


def test_names_depend_on_the_key_and_the_run(tmp_path: Path) -> None:
    names = []
    for number, (fingerprint, key) in enumerate(
        [("f1", KEY), ("f2", KEY), ("f1", SealingKey.for_tests(1)), ("f1", KEY)]
    ):
        cache(tmp_path / str(number), sealed=True, fingerprint=fingerprint, key=key).put(IDS, output())
        names.append(files(tmp_path / str(number))[0].name)
    assert len({*names}) == 3
    assert names[0] == names[3]


def test_another_key_opens_nothing(tmp_path: Path) -> None:
    stored(tmp_path, sealed=True)
    with pytest.raises(CheckpointError, match="another run, example or key"):
        cache(tmp_path, sealed=True, key=SealingKey.for_tests(1))


@both
def test_files_are_their_owners_alone(tmp_path: Path, *, sealed: bool) -> None:
    assert stat.S_IMODE(stored(tmp_path, sealed=sealed).stat().st_mode) == 0o600


def test_the_key_stays_out_of_words_and_pickles(tmp_path: Path) -> None:
    store = cache(tmp_path, sealed=True)
    store.put(IDS, output())
    said = repr(store) + repr(vars(store))
    assert KEY.reveal().hex() not in said
    assert repr(KEY.reveal()) not in said
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(store)


def test_errors_do_not_quote_the_tokens(tmp_path: Path) -> None:
    store = cache(tmp_path, sealed=False, max_bytes=1)
    ids = [987654321, 123456789]
    for attempt in (lambda: store.get(ids), lambda: store.put(ids, output(2))):
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            attempt()
        said = json.dumps([caught.value.message, caught.value.hint])
        assert "987654321" not in said
        assert "123456789" not in said


def test_a_plain_file_is_ordinary_safetensors(tmp_path: Path) -> None:
    assert torch.equal(load_file(stored(tmp_path, sealed=False))["hidden"], output())
