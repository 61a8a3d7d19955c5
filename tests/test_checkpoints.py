"""A party's own state on disk: two steps kept, whole or not at all, refused when it is not what was written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from veiltune.checkpoints import KEPT, StateStore, optimizer_tensors, restore_optimizer
from veiltune.config import TrainConfig
from veiltune.errors import CheckpointError
from veiltune.models.trunk import make_optimizer
from veiltune.tee.sealing import CHUNK_BYTES, SealingKey

KEY = SealingKey(bytes(range(32)))
STATE = {"value:a": torch.arange(6.0).view(2, 3), "step:a": torch.tensor(4.0), "rng": torch.get_rng_state()}


def store(directory: Path, *, sealed: bool, fingerprint: str = "f1") -> StateStore:
    return StateStore(directory, fingerprint, KEY if sealed else None)


def steps(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def name_of(step: int, *, sealed: bool) -> str:
    return f"step-{step:08d}.{'sealed' if sealed else 'safetensors'}"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) and value.dtype == other[name].dtype for name, value in one.items()
    )


both = pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])


# --- keeping ----------------------------------------------------------------------------------------------------------


@both
def test_state_comes_back_as_it_was(tmp_path: Path, *, sealed: bool) -> None:
    store(tmp_path / "new" / "folder", sealed=sealed).save(3, STATE)
    assert same(store(tmp_path / "new" / "folder", sealed=sealed).load(3), STATE)


@both
def test_views_and_shared_memory_are_stored_by_value(tmp_path: Path, *, sealed: bool) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"turned": whole.T, "part": whole[1], "bfloat16": whole.bfloat16(), "leaf": nn.Parameter(whole.clone())}
    store(tmp_path, sealed=sealed).save(1, tensors)
    loaded = store(tmp_path, sealed=sealed).load(1)
    assert same(loaded, {name: value.detach() for name, value in tensors.items()})


@both
@given(order=st.lists(st.integers(0, 12), min_size=1, max_size=8))
def test_the_last_two_steps_are_kept_and_later_ones_of_a_run_that_went_back_are_not(
    order: list[int], tmp_path_factory: pytest.TempPathFactory, *, sealed: bool
) -> None:
    directory = tmp_path_factory.mktemp("state")
    expected: list[int] = []
    for step in order:
        store(directory, sealed=sealed).save(step, {"step": torch.tensor(step)})
        expected = [*(old for old in expected if old < step), step][-KEPT:]
        assert steps(directory) == [name_of(kept, sealed=sealed) for kept in expected]
    for step in expected:
        assert int(store(directory, sealed=sealed).load(step)["step"]) == step
    shutil.rmtree(directory)


@both
def test_a_stale_later_step_does_not_push_out_the_committed_one(tmp_path: Path, *, sealed: bool) -> None:
    """Step 6 was written but never committed; the run went back to 4 and was interrupted after 5."""
    for step in (2, 4, 6, 5):
        store(tmp_path, sealed=sealed).save(step, STATE)
    assert steps(tmp_path) == [name_of(step, sealed=sealed) for step in (4, 5)]


@both
def test_other_files_are_left_alone(tmp_path: Path, *, sealed: bool) -> None:
    names = ["step-1.safetensors", "step-00000001.safetensors.bak", "notes.txt"]
    for name in names:
        (tmp_path / name).write_text("mine")
    for step in range(4):
        store(tmp_path, sealed=sealed).save(step, STATE)
    assert {*names} < {*steps(tmp_path)}
    assert len(steps(tmp_path)) == len(names) + KEPT


# --- refusing ---------------------------------------------------------------------------------------------------------


@both
def test_another_runs_state_is_refused(tmp_path: Path, *, sealed: bool) -> None:
    store(tmp_path, sealed=sealed).save(1, STATE)
    with pytest.raises(
        CheckpointError, match="another configuration" if not sealed else "sealed for another key or purpose"
    ):
        store(tmp_path, sealed=sealed, fingerprint="f2").load(1)


@both
def test_a_missing_step_is_named(tmp_path: Path, *, sealed: bool) -> None:
    store(tmp_path, sealed=sealed).save(1, STATE)
    with pytest.raises(CheckpointError, match="no state of step 2 in ") as caught:
        store(tmp_path, sealed=sealed).load(2)
    assert str(tmp_path) in caught.value.message
    assert "--overwrite" in str(caught.value.hint)


def test_state_sealed_by_another_key_is_refused(tmp_path: Path) -> None:
    store(tmp_path, sealed=True).save(1, STATE)
    with pytest.raises(CheckpointError, match="another key or purpose"):
        StateStore(tmp_path, "f1", SealingKey(bytes(32))).load(1)


@both
def test_one_kind_of_file_is_not_taken_for_the_other(tmp_path: Path, *, sealed: bool) -> None:
    store(tmp_path, sealed=sealed).save(1, STATE)
    with pytest.raises(CheckpointError, match="no state of step 1"):
        store(tmp_path, sealed=not sealed).load(1)
    (tmp_path / name_of(1, sealed=sealed)).rename(tmp_path / name_of(1, sealed=not sealed))
    with pytest.raises(CheckpointError, match="is not sealed state" if not sealed else "is damaged"):
        store(tmp_path, sealed=not sealed).load(1)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def cut_at_the_end(data: bytes) -> bytes:
    return data[:-1]


def add(data: bytes) -> bytes:
    return data + b"\0"


def empty(_: bytes) -> bytes:
    return b""


def zeros(data: bytes) -> bytes:
    return bytes(len(data))


def flip(position: int) -> Callable[[bytes], bytes]:
    def tamper(data: bytes) -> bytes:
        at = position % len(data)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    tamper.__name__ = f"flip {position}"
    return tamper


TORN = [cut, cut_at_the_end, empty, zeros]


@pytest.mark.parametrize("tamper", [*TORN, add, flip(0), flip(9)], ids=lambda tamper: tamper.__name__)
def test_a_torn_plain_file_is_refused(tamper: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Plain state has no authenticity: what can be told is that it is not whole."""
    store(tmp_path, sealed=False).save(1, STATE)
    path = tmp_path / name_of(1, sealed=False)
    path.write_bytes(tamper(path.read_bytes()))
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        store(tmp_path, sealed=False).load(1)
    assert str(path) in caught.value.message


# The magic, version, salt, the first chunk's ciphertext, the middle, and the tag of the last chunk.
POSITIONS = (0, 8, 12, 43, 44, CHUNK_BYTES + 5, -1)


@pytest.mark.parametrize("tamper", [*TORN, add, *map(flip, POSITIONS)], ids=lambda tamper: tamper.__name__)
def test_a_sealed_file_that_was_tampered_with_is_refused(tamper: Callable[[bytes], bytes], tmp_path: Path) -> None:
    store(tmp_path, sealed=True).save(1, STATE | {"long": torch.rand(CHUNK_BYTES // 4 + 100)})  # two chunks
    path = tmp_path / name_of(1, sealed=True)
    path.write_bytes(tamper(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"is not sealed state|sealing version|does not open"):
        store(tmp_path, sealed=True).load(1)


@both
def test_an_older_step_put_in_the_place_of_a_newer_is_refused(tmp_path: Path, *, sealed: bool) -> None:
    for step in (1, 2):
        store(tmp_path, sealed=sealed).save(step, STATE)
    shutil.copy(tmp_path / name_of(1, sealed=sealed), tmp_path / name_of(2, sealed=sealed))
    with pytest.raises(CheckpointError, match="does not open" if sealed else "holds the state of step 1"):
        store(tmp_path, sealed=sealed).load(2)


def test_a_plain_safetensors_file_of_another_origin_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / name_of(1, sealed=False))
    with pytest.raises(CheckpointError):
        store(tmp_path, sealed=False).load(1)


# --- whole or not at all ----------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for a kill: nothing that handles errors may swallow it."""


@both
def test_a_crash_before_the_new_file_is_in_place_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, sealed: bool
) -> None:
    kept = store(tmp_path, sealed=sealed)
    kept.save(1, STATE)
    kept.save(2, STATE)
    changed = {"rng": torch.zeros(3)}

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        for step in (2, 3):  # over an old one, and as a new one
            with pytest.raises(Crash):
                kept.save(step, changed)
    assert same(kept.load(1), STATE)
    assert same(kept.load(2), STATE)
    with pytest.raises(CheckpointError, match="no state of step 3"):
        kept.load(3)
    kept.save(3, changed)  # what the crash left lying about does no harm
    assert same(kept.load(3), changed)


@both
def test_a_crash_after_the_new_file_is_in_place_leaves_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, sealed: bool
) -> None:
    kept = store(tmp_path, sealed=sealed)
    for step in (1, 2):
        kept.save(step, STATE)

    def crash(_: object) -> None:
        raise Crash

    monkeypatch.setattr(Path, "unlink", crash)
    with pytest.raises(Crash):
        kept.save(3, STATE)
    assert same(kept.load(2), STATE)
    assert same(kept.load(3), STATE)


def test_sealed_state_shows_no_number_and_no_name(tmp_path: Path) -> None:
    secret = torch.rand(64)
    plain, sealed = store(tmp_path / "plain", sealed=False), store(tmp_path / "sealed", sealed=True)
    found = []
    for kept in (plain, sealed):
        kept.save(1, {"value:block0.lora_A": secret})
        (path,) = kept.directory.iterdir()
        found.append((secret.numpy().tobytes() in path.read_bytes(), b"lora_A" in path.read_bytes()))
    assert found == [(True, True), (False, False)]


# --- the optimiser ----------------------------------------------------------------------------------------------------


class Regression:
    """Parameters, an optimiser and gradients that depend on both and on the random state (as dropout's do)."""

    def __init__(self, optimizer: Any, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(1)
        self.parameters = {name: nn.Parameter(torch.randn(3, 2).to(dtype)) for name in ("a.lora_A", "a.lora_B")}
        train = TrainConfig(optimizer=optimizer, learning_rate=0.1, weight_decay=0.01)
        self.optimizer = make_optimizer(self.parameters, train)

    def run(self, count: int) -> list[dict[str, Tensor]]:
        values = []
        for step in range(count):
            self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            loss = sum(
                (value * torch.randn_like(value)).sum() + value.square().sum() for value in self.parameters.values()
            )
            loss.backward()  # pyrefly: ignore
            self.optimizer.step()
            self.optimizer.zero_grad()
            values.append({name: value.detach().clone() for name, value in self.parameters.items()})
        return values


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("done", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_restored_state_continues_bit_for_bit(optimizer: str, done: int, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = Regression(optimizer, dtype)
    whole.run(done)
    kept = store(tmp_path, sealed=True)
    kept.save(done, optimizer_tensors(whole.optimizer, whole.parameters))
    rest = whole.run(3)

    other = Regression(optimizer, dtype)
    other.run(5)  # elsewhere, and with another random state
    restore_optimizer(other.optimizer, other.parameters, kept.load(done))
    assert all(same(found, expected) for found, expected in zip(other.run(3), rest, strict=True))


def test_moments_and_random_state_are_what_makes_it_continue() -> None:
    """The control of the test above: without either, the paths part."""
    whole = Regression("adamw")
    whole.run(3)
    state = {name: value.clone() for name, value in optimizer_tensors(whole.optimizer, whole.parameters).items()}
    assert {name.partition(":")[0] for name in state} >= {"rng", "value", "step", "exp_avg", "exp_avg_sq"}
    rest = whole.run(2)
    for left_out in ("exp_avg", "exp_avg_sq", "value", "rng"):
        changed = {n: torch.zeros_like(v) if n.partition(":")[0] == left_out != "rng" else v for n, v in state.items()}
        if left_out == "rng":
            changed["rng"] = torch.Generator().manual_seed(99).get_state()
        other = Regression("adamw")
        restore_optimizer(other.optimizer, other.parameters, changed)
        assert not same(other.run(2)[-1], rest[-1]), left_out


def test_restoring_keeps_the_parameters_themselves() -> None:
    """The model holds them: a new parameter would be trained by nobody."""
    one = Regression("adamw")
    one.run(1)
    before = dict(one.parameters)
    restore_optimizer(one.optimizer, one.parameters, optimizer_tensors(one.optimizer, one.parameters))
    assert all(one.parameters[name] is value for name, value in before.items())
    assert all(value.requires_grad for value in one.parameters.values())


def test_restored_state_is_a_copy(tmp_path: Path) -> None:
    one = Regression("adamw")
    one.run(1)
    kept = store(tmp_path, sealed=False)
    kept.save(1, optimizer_tensors(one.optimizer, one.parameters))
    tensors = kept.load(1)
    restore_optimizer(one.optimizer, one.parameters, tensors)
    one.run(2)
    assert same(tensors, load_file(tmp_path / name_of(1, sealed=False)))
