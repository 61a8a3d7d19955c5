"""The result record keeps everything, refuses what it cannot understand, and is written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import platform
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks import _record
from veiltune.errors import VeiltuneError
from veiltune.results import (
    SCHEMA_VERSION,
    Answer,
    Cost,
    DataSummary,
    EnclaveCost,
    Exactness,
    Labels,
    Measurement,
    RunResult,
    Spread,
    machine,
    measurements,
    read_result,
    to_json,
    versions,
    write_json,
    write_result,
)


def full_result(**changes: Any) -> RunResult:
    fields: dict[str, Any] = {
        "design": "obfuscatune",
        "model": "random:gpt2",
        "data": DataSummary(train="notes.jsonl", train_examples=12),
        "config": {"seed": 3, "train": {"learning_rate": 2e-4}},
        "fingerprint": "ab" * 32,
        "versions": versions(),
        "machine": machine(),
        "loss": [3.0, 2.5],
        "validation_loss": [(2, 2.25)],
        "utility": {"piqa/acc_norm": Measurement(value=0.6, n=50, ci95=(0.46, 0.72))},
        "exactness": Exactness(logits=1e-6, bounds={"logits": 1e-5}),
        "cost": Cost(
            seconds_per_step=Spread.of([1.0, 2.0, 3.0]),
            bytes={"enclave->host": {"SegmentForward": 123}},
            messages={"enclave->host": {"SegmentForward": 4}},
            crossings_per_step=16.0,
            peak_rss={"host": 1_000_000},
            enclave=EnclaveCost(param_share=0.2, flop_share=0.4, seconds_share=0.1),
            revealed_param_share={"host": 0.01},
        ),
        "simulated_enclave": True,
        "labels": Labels(reproducible_secrets=True, bfloat16="rounded"),
        "answers": [Answer(prompt="?", text="42 – “quoted”")],
    }
    return RunResult.model_validate(fields | changes)


def test_record_survives_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_result(path, full_result())
    assert read_result(path) == full_result()
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert raw["schema"] == SCHEMA_VERSION
    assert raw["utility"]["piqa/acc_norm"] == {"value": 0.6, "n": 50, "ci95": [0.46, 0.72]}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_diverged_run_is_kept_as_strict_json(tmp_path: Path, loss: float) -> None:
    path = tmp_path / "result.json"
    write_result(path, full_result(loss=[1.0, loss], config={"x": loss}))
    json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    found = read_result(path).loss[1]
    assert found == loss or (math.isnan(found) and math.isnan(loss))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": SCHEMA_VERSION + 1}, f"schema {SCHEMA_VERSION + 1}"),
        ({"schema": None}, "schema None"),
        ({"loss": "none"}, "loss"),
        ({"novelty": 1}, "novelty"),
        ({"cost": {"bytes": {"enclave to host": {"X": 1}}}}, "enclave to host"),
        ({"cost": {"enclave": {"param_share": 31.7}}}, "param_share"),
    ],
)
def test_foreign_or_altered_record_is_refused_with_a_hint(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "result.json"
    write_result(path, full_result())
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(VeiltuneError, match=message) as caught:
        read_result(path)
    assert caught.value.hint


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe"])
def test_what_is_no_record_is_refused_with_a_hint(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VeiltuneError, match=r"result\.json") as caught:
        read_result(path)
    assert caught.value.hint


def test_failed_write_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_result(path, full_result())

    def full_disk(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_result(path, full_result(loss=[9.0]))
    assert read_result(path) == full_result()
    assert list(tmp_path.iterdir()) == [path]


def test_record_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(full_result(), "design", "local")  # noqa: B010 - the type checker refuses the plain form, as it should


def test_interval_must_hold_its_value() -> None:
    with pytest.raises(ValidationError, match="does not hold"):
        Measurement(value=0.5, n=10, ci95=(0.6, 0.7))
    with pytest.raises(ValidationError, match="does not hold"):
        Measurement(value=math.nan, n=10, ci95=(0.6, 0.7))


def test_measurements_of_tasks_are_named_by_task_and_metric() -> None:
    task = {"metric": "acc_norm", "value": 0.5, "n": 4, "ci95": (0.15, 0.85), "others": {"acc": 0.25}}
    assert measurements({"piqa": task}) == {
        "piqa/acc_norm": Measurement(value=0.5, n=4, ci95=(0.15, 0.85)),
        "piqa/acc": Measurement(value=0.25, n=4, ci95=None),
    }


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40))
def test_spread_is_numpys_percentiles(values: list[float]) -> None:
    import numpy as np

    spread = Spread.of(values)
    expected = np.percentile(values, [50, 10, 90])  # linear interpolation
    assert [spread.median, spread.p10, spread.p90] == pytest.approx(expected.tolist(), rel=1e-12)
    assert spread.n == len(values)


def test_spread_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_exactness_names_what_exceeds_its_bound() -> None:
    bounds: Any = {"logits": 1e-5, "loss": 1e-6, "gradients": 1e-4, "adapter": 1e-4}
    assert Exactness(logits=1e-5, loss=1e-7, bounds=bounds).exceeded() == []
    assert Exactness(logits=2e-5, loss=1e-7, gradients=math.nan, bounds=bounds).exceeded() == ["logits", "gradients"]
    assert Exactness(logits=1.0).exceeded() == []


def test_versions_name_what_computes() -> None:
    import torch
    import transformers

    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert {"veiltune", "peft"} <= found.keys()


def test_machine_is_described_without_its_name_or_paths() -> None:
    text = machine().model_dump_json()
    assert platform.machine() in text
    assert socket.gethostname() not in text
    assert "/" not in text
    assert 1 <= machine().cpu_count <= (os.cpu_count() or 1)


@given(
    st.recursive(
        st.floats() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_plain_values_become_strict_json(value: Any) -> None:
    def bad(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    back = json.loads(to_json(value), parse_constant=bad)
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        assert back == value


# --- benchmarks' records ----------------------------------------------------------------------------------------------


def test_alternate_interleaves_and_turns_round() -> None:
    order: list[str] = []
    ticks = iter(range(100))
    tasks = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = _record.alternate(tasks, 2, warmup=1, clock=lambda: float(next(ticks)))
    assert order == [*"abc", *"abc", *"cba"]
    assert times == {"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 1.0]}


def test_ratios_are_formed_within_a_round() -> None:
    found = _record.ratios({"plain": [1.0, 10.0, 2.0], "ours": [2.0, 20.0, 6.0]}, "plain")
    assert found == {"ours": {"median": 2.0, "p10": 2.0, "p90": pytest.approx(2.8), "n": 3}}


@pytest.mark.parametrize(("tasks", "rounds"), [({}, 1), ({"a": lambda: None}, 0)])
def test_nothing_to_time_is_an_error(tasks: dict[str, Any], rounds: int) -> None:
    with pytest.raises(ValueError, match="cannot time"):
        _record.alternate(tasks, rounds)


def test_quick_run_leaves_committed_results_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_record, "RESULTS", tmp_path)

    def measure(quick: bool) -> list[_record.Row]:
        row = {"model": "m", "quick": quick, "ratio": _record.summary([1.0, 2.0]), "odd": math.inf}
        return [row, row | {"ratio": None}]

    _record.run("demo", "A demo.", measure, ["--quick", "--json"])
    out = capsys.readouterr()
    assert json.loads(out.out)["rows"][0]["quick"] is True
    assert out.out.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    _record.run("demo", "A demo.", measure, [])
    out = capsys.readouterr()
    assert out.out == ""
    assert "1.5 (1.1 to 1.9)" in out.err
    assert "model = m" in out.err
    written = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert written["schema"] == 1
    assert written["command"] == "python -m benchmarks.demo"
    assert written["rows"][0] == {"model": "m", "quick": False, "ratio": _record.summary([1.0, 2.0]), "odd": "Infinity"}
    _record.run("demo", "A demo.", measure, ["--quick", "--output", str(tmp_path / "other.json")])
    assert {path.name for path in tmp_path.iterdir()} == {"demo.json", "other.json"}
    assert str(tmp_path) not in (tmp_path / "other.json").read_text(encoding="utf-8")


def test_records_are_written_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"rows": [1, 2.5, None, True, "x"]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"rows": [1, 2.5, None, True, "x"]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"rows": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"rows": [1, 2.5, None, True, "x"]}
