"""`verify`: passes what is exact, fails what is not, and can tell the two apart."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import helpers
from commands import Ran, runner
from veiltune.errors import ConfigError, ExactnessError
from veiltune.evaluation import Verification, verify
from veiltune.evaluation.verification import CEILINGS, DEEP_LOGITS, QUANTITIES, compare, relative_error, token_rows
from veiltune.parties import provider
from veiltune.results import read_result

KAPPA = 300.0
CONDITIONED = ("obfuscatune.matrix=conditioned", f"obfuscatune.condition_number={KAPPA}")
GAUSSIAN = ("obfuscatune.matrix=gaussian", "obfuscatune.key_seed=1")
"""At a width of 32 a Gaussian key may by chance be good enough: one of eight draws was. These are not."""
DEEP = "random:llama:4,32,4,259"
CUT = ("cut.bottom_layers=1", "cut.top_layers=1")


@pytest.fixture
def veiltune(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    return runner(capsys)


def checked(model: str, *overrides: str, **arguments: Any) -> Verification:
    """`verify` with keys that are the same in every run of the suite."""
    torch.manual_seed(0)
    source = helpers.model_directory(model) if model in helpers.MODELS else model
    with helpers.own_cache():
        return verify(source, overrides=("obfuscatune.key_seed=1", *overrides), **arguments)


# --- comparison -------------------------------------------------------------------------------------------------------


def probe(**changes: Tensor) -> dict[str, Tensor]:
    made = {
        "logits": torch.tensor([1.0, -4.0]),
        "logits_tuned": torch.tensor([2.0, 2.0]),
        "losses": torch.tensor([2.0, 1.0]),
        "gradient:a": torch.tensor([0.0, 0.5]),
        "adapter:a": torch.tensor([8.0]),
        "tokens": torch.tensor([1, 2]),
    }
    return made | changes


@pytest.mark.parametrize(
    ("changes", "quantity", "error"),
    [
        ({"logits": torch.tensor([1.0, -4.2])}, "logits", 0.05),
        ({"logits_tuned": torch.tensor([2.0, 2.2])}, "logits", 0.1),
        ({"losses": torch.tensor([2.0, 1.25])}, "loss", 0.25),
        ({"gradient:a": torch.tensor([0.1, 0.5])}, "gradients", 0.2),
        ({"adapter:a": torch.tensor([4.0])}, "adapter", 0.5),
        ({"adapter:a": torch.tensor([[8.0]])}, "adapter", float("inf")),
        ({"gradient:b": torch.tensor([0.0])}, "gradients", float("inf")),
    ],
)
def test_each_quantity_is_compared_by_its_largest_entry(changes: Any, quantity: Any, error: float) -> None:
    found = compare(probe(), probe(**changes))
    assert found.pop(quantity) == pytest.approx(error)
    assert set(found.values()) == {0.0}
    assert set(compare(probe(), probe()).values()) == {0.0}


def test_what_is_not_a_number_is_never_within(tmp_path: Path) -> None:
    nan = torch.tensor([float("nan"), 0.5])
    error = compare(probe(), probe(**{"gradient:a": nan, "gradient:b": nan}) | {"adapter:a": nan[:1]})
    assert not error["adapter"] <= 1.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.zeros(2), torch.ones(2)) == float("inf")


# --- designs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["compact", "paper"])
@pytest.mark.parametrize("model", ["gpt2", "opt", "llama", "qwen3"])
def test_orthogonal_keys_pass(model: str, placement: str) -> None:
    found = checked(model, f"obfuscatune.placement={placement}")
    assert found.failures == []
    found.require()
    assert found.greedy_equal
    assert {check.quantity for check in found.checks} == set(QUANTITIES)
    assert any(check.error > 0 for check in found.checks), "two computations, not one compared with itself"
    for check in found.checks:
        assert check.ceiling == CEILINGS["float32"][check.quantity]
        assert check.limit <= CEILINGS["float32"][check.quantity]
    assert found.result.exactness.exceeded() == []
    assert found.result.simulated_enclave


def test_float64_is_held_to_its_own_bound() -> None:
    found = checked("opt", dtype="float64")
    found.require()
    assert all(check.limit < 1e-12 for check in found.checks)


def test_bfloat16_has_the_derived_bound_alone() -> None:
    found = checked("llama", dtype="bfloat16")
    found.require()
    assert all(check.ceiling is None for check in found.checks)
    assert found.checks[0].error > CEILINGS["float32"]["logits"], "it was rounded"
    assert found.result.labels.bfloat16 == "rounded"


@pytest.mark.parametrize("model", ["gpt2", "opt", "llama"])
def test_the_gaussian_key_fails_the_orthogonal_bound(model: str) -> None:
    found = checked(model, *GAUSSIAN)
    assert found.condition_number == 1.0
    assert found.own_condition_number is None
    assert any(failure.startswith("logits") for failure in found.failures)
    with pytest.raises(ExactnessError, match=r"is not the plain model within its bound: logits") as raised:
        found.require()
    assert raised.value.exit_code == 5
    assert "logits" in found.result.exactness.exceeded()


@pytest.mark.parametrize(
    ("design", "options"),
    [
        ("split", ()),
        ("online", ("online.wire.activation_bits=32", "online.wire.gradient_bits=32", "online.decorrelation.alpha=0")),
        ("gradfree", ("gradfree.wire.activation_bits=32",)),
    ],
)
def test_designs_that_cut_the_model_pass_where_they_claim_to_be_exact(design: str, options: tuple[str, ...]) -> None:
    """Against `local` with the same layers trained: other tensors in the adapter would be an error without bound."""
    found = checked(DEEP, *CUT, *options, design=design)
    found.require()
    assert found.greedy_equal
    assert not found.result.simulated_enclave


@pytest.mark.parametrize("design", ["online", "gradfree", "offsite", "offline"])
def test_an_approximate_design_fails_and_the_hint_says_that_it_claims_no_more(design: str) -> None:
    found = checked(DEEP, *CUT, design=design)
    assert found.failures
    with pytest.raises(ExactnessError) as raised:
        found.require()
    assert f"{design} does not claim to be: approximate" in str(raised.value.hint)


def test_a_model_without_its_trunk_does_not_claim_to_be_the_plain_one() -> None:
    found = checked(DEEP, *CUT, "local.layers=alone", design="local")
    with pytest.raises(ExactnessError) as raised:
        found.require()
    assert "local does not claim to be" in str(raised.value.hint)


def test_a_conditioned_key_keeps_to_its_own_bound_and_not_to_the_orthogonal_one() -> None:
    own = checked("opt", *CONDITIONED)
    own.require()
    assert own.condition_number == own.own_condition_number == KAPPA
    assert own.checks[0].ceiling == pytest.approx(KAPPA * CEILINGS["float32"]["logits"])
    assert checked("opt", *CONDITIONED, against="orthogonal").failures


def test_only_the_logits_ceiling_is_higher_for_a_deep_model() -> None:
    found = checked("random:llama:5,32,4,259", steps=1)
    found.require()
    expected = {**CEILINGS["float32"], "logits": DEEP_LOGITS}
    assert {check.quantity: check.ceiling for check in found.checks} == pytest.approx(expected)


def test_a_models_own_dropout_does_not_disturb_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(helpers.model_directory("gpt2"), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    without = checked(str(folder))
    without.require()
    monkeypatch.setattr(provider, "_DROPOUT", provider.re.compile("no such key"))
    assert checked(str(folder)).result.loss != without.result.loss, "dropout changes the loss, so it was off"


def test_text_is_used_where_the_model_knows_any(tmp_path: Path) -> None:
    rows = token_rows(helpers.model_directory("llama"))
    assert [len(row) for row in rows] == [32] * 4
    assert bytes(rows[0]).decode().startswith("The ferry")
    with helpers.own_cache():
        drawn = token_rows("random:llama")
    assert drawn != rows
    assert max(max(row) for row in drawn) > 259, "the whole vocabulary"


# --- as a command -----------------------------------------------------------------------------------------------------


def test_the_record_is_kept_where_asked(tmp_path: Path) -> None:
    found = checked("llama", output=tmp_path / "kept")
    record = read_result(tmp_path / "kept" / "result.json")
    assert record == found.result
    assert record.exactness.logits == found.checks[0].error
    assert record.loss == pytest.approx(found.result.loss)
    assert (tmp_path / "kept" / "protected" / "config.json").is_file()
    with pytest.raises(ConfigError, match="not empty"):
        checked("llama", output=tmp_path / "kept")


def test_a_failed_verification_is_shown_recorded_and_exits_with_5(veiltune: Any, tmp_path: Path) -> None:
    model = helpers.model_directory("opt")
    chosen = [word for each in GAUSSIAN for word in ("--set", each)]
    ask = ("verify", model, *chosen, "--json", "--output", str(tmp_path / "out"))
    ran = veiltune(*ask)
    assert ran.code == 5
    assert ran.err.count("error: ") == 1
    assert "EXCEEDS" in ran.err
    assert ran.json["is_within"] is False
    assert "is not the plain model" in ran.json["error"]
    assert read_result(tmp_path / "out" / "result.json").exactness.exceeded()


def test_a_verification_that_holds_exits_with_0(veiltune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = helpers.model_directory("llama")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ran = veiltune("verify", model, "--json", "--dtype", "float64", "--steps", "2")
    assert ran.code == 0
    assert ran.json["is_within"] is True
    assert "error" not in ran.json
    assert ran.json["steps"] == 2
    assert {check["quantity"] for check in ran.json["checks"]} == set(QUANTITIES)
    kept = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert kept == ["result.json"], "the record stays, both runs go"
