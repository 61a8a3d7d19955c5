"""Attacks on texts of which most positions were never sent: what they find, what they leave out, and their controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cutting import cut_config, deep_model, plain
from recording import Record, attacked, recorder, write_questions
from veiltune.attacks import View, load_view, make_attack
from veiltune.attacks.base import UNKNOWN
from veiltune.attacks.matching import match_states
from veiltune.attacks.passes import (
    Agreement,
    begins_pass,
    has_gaps,
    joined,
    places_in,
    places_of,
    smashed_states,
    spread,
)
from veiltune.attacks.scores import score_text
from veiltune.config import Config
from veiltune.errors import UserError
from veiltune.evaluation.attacking import attack_run, rights_of, run_config, transcripts_of
from veiltune.evaluation.case import Wanted, load_case
from veiltune.evaluation.truth import scorer_reads
from veiltune.models.bottom import Bottom
from veiltune.privacy.quantisation import WireOptions

LAST = 6
INT8 = {"activation_bits": 8, "gradient_bits": 8}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "online": ("online", {"online": {"wire": INT8, "last_positions": LAST}}),
    "online-0": (
        "online",
        {"online": {"wire": INT8, "last_positions": LAST}, "cut": {"bottom_layers": 0, "top_layers": 1}},
    ),
    "online-gpt2": ("online", {"online": {"wire": INT8, "last_positions": LAST}}),
    "gradfree": ("gradfree", {"gradfree": {"last_positions": LAST}}),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Runs of `RUNS` by name, each with questions."""
    directory = tmp_path_factory.mktemp("gaps")
    questions = str(write_questions(directory))

    def configure(name: str, output: Path, victim: str) -> Config:
        design, options = RUNS[name]
        tables: dict[str, Any] = {
            "data": {"train": victim},
            "train": {"steps": 2},
            "evaluate": {"tasks": [questions]},
            "session": {"record": ["provider"]},
            **options,
        }
        return cut_config(design, output, deep_model("gpt2" if name.endswith("gpt2") else "llama"), **tables)

    return recorder(directory, configure, texts=12, public=150)


def view_of(run: Path) -> View:
    rights = rights_of(run_config(run).design, "provider")
    return load_view(transcripts_of(run, "provider"), rights, scorer_reads(rights.receives | rights.sends), begins_pass)


@pytest.mark.parametrize("name", RUNS)
def test_a_view_tells_where_the_states_stand(name: str, recorded: Record) -> None:
    passes = smashed_states(view_of(recorded(name)))
    places = places_in(passes)
    assert has_gaps(places)
    for states, where in zip(joined(passes), places, strict=True):
        length = int(where[-1]) + 1
        assert where.tolist() == [0, *range(length - LAST, length)]
        assert len(states) == LAST + 1


def test_pieces_of_a_generation_stand_one_after_another() -> None:
    told = [torch.tensor([[0, 7, 8]]), torch.tensor([[9]]), torch.tensor([[10]])]
    assert places_of(told, [3, 1, 1], 1).tolist() == [[0, 7, 8, 9, 10]]
    assert places_of([None, None], [3, 1], 2).tolist() == [[0, 1, 2, 3]] * 2


def test_guesses_stand_at_their_places_and_gaps_count_as_not_found() -> None:
    found = spread([5, 6, 7], torch.tensor([0, 3, 4]))
    assert found == [5, UNKNOWN, UNKNOWN, 6, 7]
    scores = score_text([5, 1, 2, 6, 7], found, lambda tokens: " ".join(f"w{token}" for token in tokens))
    assert scores["token_recovery"] == 3 / 5
    assert scores["rougeL"] == 2 * 3 / (5 + 3)


@pytest.mark.parametrize("phase", ["tuning", "questions"])
def test_matching_finds_what_was_sent_and_no_more(phase: Any, recorded: Record) -> None:
    """Without blocks in the bottom each state is its token's alone: all that was sent is found, exactly."""
    found = attack_run(recorded("online-0"), make_attack("vocabulary_matching", {}), phase=phase, limit=4)
    figure = {each.metric: each for each in found.findings}["token_recovery"]
    case: Any = load_case(
        recorded("online-0"),
        run_config(recorded("online-0")),
        make_attack("vocabulary_matching", {}),
        Wanted(phase, "first", 4, 0, None),
        lambda _: None,
    )
    share = sum((LAST + 1) / len(truth) for truth in case.truths) / len(case.truths)
    assert figure.value == pytest.approx(share)
    assert figure.leaky_control == 1.0


@pytest.mark.parametrize("name", ["online", "online-gpt2", "gradfree"])
def test_matching_goes_on_behind_a_gap(name: str, recorded: Record) -> None:
    """The prefix is not known there, so that less is found than was sent; the control has every position."""
    figure = attacked(recorded(name), "vocabulary_matching")["token_recovery"]
    assert figure.leaky_control >= 0.95
    assert figure.value <= (LAST + 1) / 20 + 0.02
    assert figure.value > figure.shuffled_control


def test_matching_behind_a_gap_needs_the_places() -> None:
    """Two-sided: told the true places it finds more of a text's end than taking the states for a text of their own."""
    model = plain(deep_model("gpt2"))
    ids = torch.randint(5, 250, (6, 30), generator=torch.Generator().manual_seed(0))
    where = torch.tensor([0, *range(22, 30)])
    with torch.no_grad():
        states = list(Bottom(model, 1).states(ids)[:, where])
    agreed = Agreement(1, WireOptions(), 1)

    def share(places: Any) -> float:
        rng = torch.Generator().manual_seed(0)
        found = match_states(Bottom(model, 1), agreed, states, rng, shortlist=64, places=places)
        return float((torch.tensor(found) == ids[:, where]).float().mean())

    assert share([where] * 6) > share(None) + 0.1


def test_the_ridge_inverter_leaves_gaps_out(recorded: Record) -> None:
    figure = attacked(recorded("online"), "ridge_inverter")["token_recovery"]
    assert figure.leaky_control >= 0.6
    assert 0 < figure.value <= (LAST + 1) / 20 + 0.02


@pytest.mark.slow
@pytest.mark.ci
def test_the_learned_inverter_guesses_every_position(recorded: Record) -> None:
    """Random letters: at the gaps nothing is to be learnt but how frequent a letter is, one in fifty."""
    run = recorded("online")
    found = attack_run(
        run,
        make_attack("learned_inverter", {"width": 128, "epochs": 20, "learning_rate": 4e-3}),
        phase="tuning",
        limit=4,
        corpus=str(run.parent / "public.jsonl"),
    )
    figure = {each.metric: each for each in found.findings}["token_recovery"]
    assert figure.leaky_control >= 0.8
    assert figure.shuffled_control < 0.2
    sent = (LAST + 1) / 22
    assert 0.5 * sent < figure.value < sent + 0.15
    assert all(len(sample.found) >= 15 for sample in found.samples)


@pytest.mark.parametrize("name", ["activation_inversion", "gradient_labels", "bisr"])
def test_attacks_on_whole_texts_say_why_not(name: str, recorded: Record) -> None:
    with pytest.raises(UserError, match=f"{name} matches whole texts"):
        attacked(recorded("online"), name)
