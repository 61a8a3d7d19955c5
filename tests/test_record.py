"""The record of a run: every figure is where it belongs, and each can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import helpers
from veiltune.config import Config
from veiltune.evaluation import result_of
from veiltune.evaluation.record import count_shares, labels_of
from veiltune.models.accounting import shares
from veiltune.models.cut import Cut
from veiltune.models.families import find_family
from veiltune.models.sources import resolve_config
from veiltune.models.veil_accounting import veil_placement
from veiltune.results import Exactness
from veiltune.session import Outcome


def counts(messages: int, num_bytes: int) -> dict[str, int]:
    return {"messages": messages, "bytes": num_bytes}


TRAFFIC = {
    "owner->enclave": {
        "TrainBatch": counts(4, 400),
        "OptimizerStep": counts(2, 20),
        "EvalBatch": counts(4, 4000),
        "GenerateRequest": counts(1, 70),
        "Goodbye": counts(1, 6),
    },
    "enclave->owner": {
        "BatchLoss": counts(8, 800),
        "StepDone": counts(2, 40),
        "GeneratedToken": counts(30, 300),
    },
    "enclave->host": {"SegmentForward": counts(10, 9000), "Forget": counts(3, 30), "OptimizerStep": counts(2, 9999)},
    "host->enclave": {"SegmentOutput": counts(10, 9000), "StepDone": counts(2, 9999)},
}


def outcome(**owner: Any) -> Outcome:
    figures = {
        "history": {"step": 2, "loss": [3.0, 2.5], "seconds": [0.5, 0.7], "tokens": 90, "validation_loss": [[2, 2.4]]},
        "engine": {
            "engine_seconds": 8.0,
            "wait_seconds": 6.0,
            "crossings_per_step": 11.0,
            "border_bytes_per_step": 1000.0,
        },
        "data": {"train_examples": 12, "validation_examples": 3, "train_tokens": 200},
        "enclave": "simulated",
        "model": {"config": json.loads((Path(helpers.model_directory("llama")) / "config.json").read_text())},
        "peak_rss": 5,
        **owner,
    }
    return Outcome(figures={"owner": figures, "host": {"peak_rss": 7}}, traffic=TRAFFIC)


def configured(tmp_path: Path, design: str = "obfuscatune", **tables: Any) -> Config:
    return helpers.make_config(design, "llama", tmp_path, lora={"init_seed": None}, **tables)


def test_what_the_owner_measured_is_recorded(tmp_path: Path) -> None:
    task = {"metric": "acc_norm", "value": 0.5, "n": 4, "ci95": (0.2, 0.8), "others": {"acc": 0.25}}
    found = outcome(utility={"after": {"piqa": task}}, generated={"prompt": "why", "text": "because", "tokens": [1, 2]})
    record = result_of(configured(tmp_path), found, exactness=Exactness(logits=1e-7))
    assert record.loss == [3.0, 2.5]
    assert record.validation_loss == [(2, 2.4)]
    assert record.utility["piqa/acc_norm"].ci95 == (0.2, 0.8)
    assert record.utility["piqa/acc"].value == 0.25
    assert record.utility_before == {}
    assert record.exactness.logits == 1e-7
    assert (record.answers[0].prompt, record.answers[0].text) == ("why", "because")
    assert record.data.train_tokens == 200
    assert record.cost.seconds_per_step is not None
    assert record.cost.seconds_per_step.median == pytest.approx(0.6)
    assert record.cost.peak_rss == {"owner": 5, "host": 7}
    assert record.fingerprint == configured(tmp_path).run_fingerprint()


def test_costs_are_those_of_the_meters(tmp_path: Path) -> None:
    cost = result_of(configured(tmp_path), outcome()).cost
    assert cost.bytes["owner->enclave"]["EvalBatch"] == 4000
    assert cost.messages["enclave->owner"]["GeneratedToken"] == 30
    # Of a step: 400 + 20 + 40 and half of the losses' 800, over 2 steps; the rest of the border is the enclave's figure.
    assert cost.bytes_per_step == pytest.approx((400 + 20 + 40 + 400) / 2 + 1000)
    assert cost.crossings_per_step == 11.0
    # 11 requests of the owner (tokens come unasked, a farewell waits for nothing), 12 answers of the host.
    assert cost.rounds == 11 + 12
    assert cost.enclave.seconds_share == pytest.approx(0.25)


def test_nothing_trained_is_no_cost_of_a_step(tmp_path: Path) -> None:
    cost = result_of(configured(tmp_path), Outcome(figures={"owner": {}})).cost
    assert (cost.bytes_per_step, cost.seconds_per_step, cost.rounds) == (None, None, 0)
    assert cost.enclave.seconds_share is None


def test_shares_are_counted_for_the_length_that_was_trained_on(tmp_path: Path) -> None:
    config = configured(tmp_path, obfuscatune={"placement": "paper"})
    model = resolve_config(config.model)
    counted = shares(
        model, "paper", config.train.batch_size, 12
    )  # 90 tokens in 2 steps of 4 sequences: 11.25, rounded up
    found = result_of(config, outcome()).cost
    assert found.enclave.flop_share == counted.flop_share
    assert found.enclave.param_share == counted.param_share
    assert found.revealed_param_share == {"host": counted.revealed_param_share}
    assert result_of(config, outcome(), length=500).cost.enclave.flop_share != counted.flop_share


def test_local_has_no_enclave_and_reveals_everything(tmp_path: Path) -> None:
    record = result_of(configured(tmp_path, "local"), outcome(engine={}, enclave=None))
    assert record.simulated_enclave is False
    assert record.cost.enclave.param_share is None
    assert record.cost.revealed_param_share == {"host": 1.0}


@pytest.mark.parametrize(
    ("design", "tables", "seeded"),
    [
        ("obfuscatune", {}, False),
        ("obfuscatune", {"lora": {"init_seed": 0}}, True),
        ("obfuscatune", {"obfuscatune": {"key_seed": 0}}, True),
        ("local", {"lora": {"init_seed": 0}}, False),
    ],
)
def test_secrets_from_a_seed_are_labelled(tmp_path: Path, design: str, tables: Any, *, seeded: bool) -> None:
    config = helpers.make_config(design, "llama", tmp_path, **({"lora": {"init_seed": None}} | tables))
    assert labels_of(config).reproducible_secrets is seeded
    assert result_of(config, outcome()).simulated_enclave is True


def test_bfloat16_on_a_cpu_is_labelled_as_rounded(tmp_path: Path) -> None:
    assert labels_of(configured(tmp_path, dtype="bfloat16")).bfloat16 == "rounded"
    assert labels_of(configured(tmp_path)).bfloat16 is None


def test_the_record_is_made_where_the_model_is_not(tmp_path: Path) -> None:
    """An owner has the provider's card, and need not be able to read what the provider calls its model."""
    here = helpers.make_config("obfuscatune", "llama", tmp_path)
    elsewhere = here.model_copy(update={"model": "sealed:vendor/model.sealed"})
    assert result_of(elsewhere, outcome()).cost == result_of(here, outcome()).cost
    assert result_of(here, outcome()).cost.enclave.param_share


@pytest.mark.parametrize("placement", ["compact", "paper"])
@pytest.mark.parametrize("model", ["gpt2", "opt", "llama", "qwen3"])
def test_what_is_counted_in_the_enclave_is_what_it_holds(model: str, placement: str, tmp_path: Path) -> None:
    """The accounts come from a configuration, the enclave's own count from the tensors it was sent."""
    config = helpers.make_config("obfuscatune", model, tmp_path, obfuscatune={"placement": placement})
    found = helpers.run(config, "provision")
    counted = shares(resolve_config(config.model), placement, 1, 8)  # pyrefly: ignore
    assert found.owner["engine"]["enclave_parameters"] == counted.enclave_parameters
    assert found.owner["model"]["num_parameters"] == counted.num_parameters


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_what_is_counted_in_the_enclave_of_veil_is_what_it_holds(model: str, layers: int, tmp_path: Path) -> None:
    """Its own count leaves out the gains and biases of the trunk's norms, which it keeps to map factors with."""
    config = helpers.make_config("veil", model, tmp_path, veil={"enclave_layers": layers})
    found = helpers.run(config, "provision")
    plain = resolve_config(config.model)
    counted = count_shares(config, plain, 8)
    cut, family = Cut.of(plain, layers, 0), find_family(plain)
    trunk = [place for place in veil_placement(plain, cut) if cut.holds(family, place.name) == "trunk"]
    folded = sum(place.num_parameters for place in trunk if place.holder == "enclave")
    assert counted is not None
    assert folded > 0
    assert found.owner["engine"]["enclave_parameters"] == counted.enclave_parameters - folded
    assert found.owner["model"]["num_parameters"] == counted.num_parameters
