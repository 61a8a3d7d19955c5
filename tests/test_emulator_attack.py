"""Emulator misuse on recorded runs of tiny models: what an owner's model is worth, with and without repairs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import helpers
from cutting import cut_config, deep_model
from recording import Record, attacked, recorder
from veiltune.attacks import make_attack
from veiltune.attacks.base import predictions
from veiltune.attacks.scores import score_predictions
from veiltune.config import Config
from veiltune.errors import DataError, UserError
from veiltune.evaluation.attacking import attack_run

EMULATORS: dict[str, dict[str, Any]] = {
    "whole": {"layers": 3, "compression": "none"},
    "half": {"layers": 1, "compression": "none"},
    "int4": {"kind": "quantised", "bits": 4},
    "lowrank": {"kind": "lowrank", "rank": 0.25},
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Runs of `offsite` by emulator, whose owner was recorded."""

    def configure(name: str, output: Path, victim: str) -> Config:
        tables: dict[str, Any] = {
            "data": {"train": victim},
            "train": {"steps": 1},
            "session": {"record": ["owner"]},
            "offsite": {"emulator": EMULATORS[name]},
        }
        return cut_config("offsite", output, deep_model("llama"), **tables)

    return recorder(tmp_path_factory.mktemp("emulators"), configure, texts=8, public=60)


def agreement(run: Path, **settings: Any) -> Any:
    return attacked(run, "emulator_misuse", **settings)["agreement"]


def test_an_emulator_that_is_the_trunk_is_the_model(recorded: Record) -> None:
    found = attacked(recorded("whole"), "emulator_misuse", learn_from="nothing")
    assert found["agreement"].value == 1.0
    assert found["agreement"].leaky_control == 1.0
    assert found["next_token_accuracy"].value == found["next_token_accuracy"].leaky_control
    assert found["agreement"].n == 4


@pytest.mark.parametrize("name", ["half", "int4", "lowrank"])
def test_a_poorer_emulator_is_a_poorer_model(name: str, recorded: Record) -> None:
    found = agreement(recorded(name), learn_from="nothing")
    assert found.leaky_control == 1.0
    assert found.value < 1.0


def test_what_is_kept_of_the_trunk_tells(recorded: Record) -> None:
    """Four-bit weights are nearer to the trunk than one block of three, and that is no further than nothing at all."""
    close = agreement(recorded("int4"), learn_from="nothing").value
    far = agreement(recorded("half"), learn_from="nothing").value
    empty = agreement(recorded("half"), start="empty").value
    assert close > far
    assert close > empty


def write_walks(path: Path, count: int) -> Path:
    """Texts in which each letter has one that mostly follows it."""
    draw = random.Random(3)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            walk = [draw.randrange(26)]
            while len(walk) < 32:
                walk.append((7 * walk[-1] + 3) % 26 if draw.random() < 0.7 else draw.randrange(26))
            file.write(json.dumps({"text": "".join(chr(97 + step) for step in walk)}) + "\n")
    return path


def test_learning_from_text_makes_the_model_better(recorded: Record, tmp_path: Path) -> None:
    run, corpus = recorded("half"), str(write_walks(tmp_path / "walks.jsonl", 80))
    shares = []
    for settings in ({"learn_from": "nothing"}, {"steps": 80, "learning_rate": 1e-2}):
        findings = attack_run(run, make_attack("emulator_misuse", settings), corpus=corpus).findings
        figures = {each.metric: each for each in findings}
        shares.append(figures["next_token_accuracy"].value)
        assert figures["agreement"].leaky_control == 1.0
    assert shares[0] < 0.1
    assert shares[1] > shares[0] + 0.1


def test_without_a_query_there_is_nothing_to_distil_from(recorded: Record) -> None:
    with pytest.raises(DataError, match="asked the trunk nothing"):
        agreement(recorded("half"), learn_from="queries")


def test_settings_are_checked(recorded: Record) -> None:
    with pytest.raises(UserError, match="learn_from"):
        make_attack("emulator_misuse", {"learn_from": "dreams"})
    assert make_attack("emulator_misuse", {"steps": 0}).setting == "steps=0"


def test_held_out_text_is_not_learnt_from(recorded: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the thief learns from holds none of the texts that it is measured on."""
    from veiltune.attacks import emulator
    from veiltune.evaluation import scoring

    learnt: list[list[int]] = []
    measured: list[list[int]] = []
    plain = emulator._text_losses

    def learning(model: Any, corpus: Any, rng: Any) -> Any:
        learnt.extend(list(text) for text in corpus)
        return plain(model, corpus, rng)

    def measuring(model: Any, text: Any) -> list[int]:
        measured.append(list(text))
        return predictions(model, text)

    monkeypatch.setattr(emulator, "_text_losses", learning)
    monkeypatch.setattr(scoring, "predictions", measuring)
    attack_run(
        recorded("half"),
        make_attack("emulator_misuse", {"steps": 1}),
        corpus=str(recorded("half").parent / "public.jsonl"),
    )
    assert len(measured) == 8
    assert len(learnt) == 52
    assert not any(text in learnt for text in measured)


def test_predictions_are_the_models_own() -> None:
    model, text = helpers.plain_model("llama"), [5, 9, 2, 7]
    with torch.no_grad():
        slow = [int(model(input_ids=torch.tensor([text[:n]])).logits[0, -1].argmax()) for n in (1, 2, 3)]
    assert predictions(model, text) == slow
    assert score_predictions([[1, 2, 3]], [[1, 9, 3]], "share") == {"share": [2 / 3]}
