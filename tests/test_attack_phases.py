"""Which of the owner's texts an attack is after: tuned on, held out, asked later, generated; and that some never crossed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import helpers
from cutting import cut_config, deep_model
from helpers import make_config
from recording import Record, attacked, recorder, write_letters, write_questions
from veiltune.attacks import ATTACKS, make_attack
from veiltune.attacks.passes import every_row, joined, masked_first_states
from veiltune.config import Config
from veiltune.errors import DataError, UserError
from veiltune.evaluation import RESULT, hosted
from veiltune.evaluation.asked import ASKED, keep_asked, read_asked
from veiltune.evaluation.attacking import attack_run
from veiltune.evaluation.case import Case, Wanted, load_case, run_config
from veiltune.evaluation.disclosure import statement
from veiltune.evaluation.truth import TruePass, TrueRow, drawn
from veiltune.evaluation.unprotected import unprotected
from veiltune.parties.party import Job
from veiltune.results import read_result
from veiltune.study_terms import ALL_KNOWS, ALL_PHASES

OFFSITE = {"emulator": {"layers": 1}}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "online": ("online", {"online": {"wire": {"activation_bits": 8, "gradient_bits": 8}}}),
    "gradfree": ("gradfree", {}),
    "offline-kept": ("offline", {"offline": {**OFFSITE, "wire": {"activation_bits": 8}, "plug_in": False}}),
    "offline-returned": ("offline", {"offline": {**OFFSITE, "plug_in": True}}),
    "obfuscatune": ("obfuscatune", {}),
    "veil": ("veil", {"veil": {"enclave_layers": 0}}),
}
HOSTED = ("obfuscatune", "veil")
PROMPTS = ("The patient Anna Krug, 52", "Where is the key of 1945?")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Runs of `RUNS` by name, each with held-out texts, questions, and an answer to each of `PROMPTS`."""
    directory = tmp_path_factory.mktemp("phases")
    held_out = str(write_letters(directory / "held_out.jsonl", 6, seed=9))
    questions = str(write_questions(directory))

    def configure(name: str, output: Path, victim: str) -> Config:
        design, options = RUNS[name]
        tables: dict[str, Any] = {
            "data": {"train": victim, "validation": held_out},
            "train": {"steps": 2, "evaluate_every": 1},
            "evaluate": {"tasks": [questions], "before": True},
            "session": {"record": ["host" if design in HOSTED else "provider"]},
            **options,
        }
        if design in HOSTED:
            return make_config(design, "llama", output, **tables)
        return cut_config(design, output, deep_model("llama"), **tables)

    record = recorder(directory, configure, texts=12, public=40)

    def with_answers(name: str) -> Path:
        run = record(name)
        if not (run / "transcript" / ASKED).is_file():
            for prompt in PROMPTS:
                ask(configure(name, run, str(directory / "victim.jsonl")), prompt, resume=True)
        return run

    return with_answers


def ask(config: Config, prompt: str, **arguments: Any) -> None:
    job = Job(verb="generate", prompt=prompt, settings={"max_new_tokens": 6, "min_new_tokens": 4, "do_sample": False})
    outcome = helpers.run(config, job, **arguments)
    keep_asked(Path(config.output), outcome.owner["generated"])


def texts_of(run: Path, phase: Any, name: str = "vocabulary_matching", **settings: Any) -> tuple[Any, set[str]]:
    """What an attack on a phase came to, and the first words of the texts it was after."""
    found = attack_run(run, make_attack(name, settings), phase=phase, limit=3, moment="last")
    return found, {sample.truth for sample in found.samples}


def lines_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


# --- the phases -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", ["online", "gradfree"])
def test_each_phases_texts_are_attacked_apart(name: str, recorded: Record) -> None:
    run = recorded(name)
    sources = {"tuning": run.parent / "victim.jsonl", "validation": run.parent / "held_out.jsonl"}
    for phase in ALL_PHASES:
        found, truths = texts_of(run, phase)
        values = {each.metric: each for each in found.findings}
        assert values["token_recovery"].value >= 0.9, phase
        assert values["token_recovery"].leaky_control >= 0.95
        assert {(each.phase, each.knows) for each in found.findings} == {(phase, "nothing")}
        if phase in sources:
            assert all(any(line in truth for line in lines_of(sources[phase])) for truth in truths)
        elif phase == "questions":
            assert all(" number " in truth for truth in truths)
        else:
            assert all(any(prompt in truth for prompt in PROMPTS) for truth in truths)
        assert found.nothing is None
    kept = read_result(run / RESULT).privacy
    assert {"vocabulary_matching[at=last]", "vocabulary_matching[at=last; phase=questions]"} <= set(kept)


@pytest.mark.parametrize(("name", "attack"), [("obfuscatune", "gram_anchors"), ("veil", "procrustes")])
def test_a_host_attacks_questions_and_generations_too(name: str, attack: str, recorded: Record) -> None:
    settings: dict[str, Any] = {"anchors": 3} if attack == "gram_anchors" else {"distance": 0.0}
    for phase in ("validation", "questions"):
        found, _ = texts_of(recorded(name), phase, attack, **settings)
        values = {each.metric: each for each in found.findings}
        assert values["token_recovery"].value >= 0.95, phase
        assert values["token_recovery"].shuffled_control < 0.95
    found, truths = texts_of(recorded(name), "generation", "procrustes", distance=0.0)
    (recovery,) = (each for each in found.findings if each.metric == "token_recovery")
    assert recovery.value >= 0.95
    assert recovery.n == len(truths) == len(PROMPTS)


@pytest.mark.parametrize("name", HOSTED)
def test_without_protection_the_host_sees_every_phase_bare(name: str, recorded: Record) -> None:
    """Who counts equal states counts those of all phases; were one still under a key, its tokens would count as others."""
    run = recorded(name)
    attack, corpus = make_attack("codebook", {}), str(run.parent / "public.jsonl")
    case = load_case(run, run_config(run), attack, Wanted("tuning", "first", 4, 0, corpus), lambda _: None)
    assert isinstance(case, Case)
    assert {*case.passes}.isdisjoint(case.beside)
    tokens = [token for text in hosted.texts_of({**case.beside, **case.passes}) for token in text]

    def distinct(beside: dict[int, TruePass]) -> int:
        bare = unprotected(case.view, case.model, case.passes, case.config.cut, beside=beside)
        rows = torch.cat(joined(masked_first_states(every_row(bare))))
        assert len(rows) == len(tokens)
        return len(rows.mul(1e4).round().unique(dim=0))

    assert distinct(case.beside) == len(set(tokens))
    assert distinct({}) > len(set(tokens))


def test_without_a_phase_the_first_that_crossed_is_attacked(recorded: Record) -> None:
    assert attacked(recorded("online"), "vocabulary_matching")["rougeL"].phase == "tuning"
    assert attacked(recorded("offline-kept"), "vocabulary_matching", limit=3)["rougeL"].phase == "questions"


# --- nothing crossed ----------------------------------------------------------------------------------------------------


def test_of_offline_tuning_nothing_crosses_and_the_transcript_says_so(recorded: Record) -> None:
    run = recorded("offline-kept")
    for phase in ("tuning", "validation"):
        found, _ = texts_of(run, phase)
        assert found.findings == ()
        assert found.nothing is not None
        assert (found.nothing.phase, found.nothing.num_passes, found.nothing.num_returned) == (phase, 0, 0)
        assert found.nothing.num_others >= 2 + len(PROMPTS), "questions before and after, and generations"
    kept = read_result(run / RESULT)
    assert kept.privacy["nothing_crossed[tuning]"]["passes"]["value"] == 0
    assert "nothing crossed of texts that were tuned on: 0 of" in str(statement(kept))
    questions, _ = texts_of(run, "questions")
    assert questions.findings, "what is asked later does cross"


def test_layers_that_were_returned_are_counted(recorded: Record) -> None:
    found, _ = texts_of(recorded("offline-returned"), "tuning")
    assert found.nothing is not None
    assert (found.nothing.num_passes, found.nothing.num_returned) == (0, 1)
    assert "1 message(s) with layers tuned on them" in str(
        statement(read_result(recorded("offline-returned") / RESULT))
    )


def test_a_pass_that_nothing_explains_is_no_nothing(recorded: Record, tmp_path: Path) -> None:
    """The same transcript beside a configuration that asks no questions: then what crossed may be of anything."""
    run = tmp_path / "run"
    shutil.copytree(recorded("offline-kept"), run)
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["evaluate"]["tasks"] = []
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="neither questions nor generations"):
        texts_of(run, "tuning")


@pytest.mark.parametrize(
    ("name", "phase", "attack", "said"),
    [
        ("online", "questions", "gradient_labels", "is not for questions asked later"),
        ("offline-kept", "questions", "emulator_misuse", "no transcript of the owner"),
    ],
)
def test_a_phase_that_an_attack_is_not_for_is_refused(
    name: str, phase: Any, attack: str, said: str, recorded: Record
) -> None:
    with pytest.raises(UserError, match=said):
        texts_of(recorded(name), phase, attack)


# --- generations ----------------------------------------------------------------------------------------------------------


def test_one_generation_that_was_never_tuned_is_attacked_and_has_its_controls(tmp_path: Path) -> None:
    """The shuffled control is then of the run's other texts."""
    victim = str(write_letters(tmp_path / "victim.jsonl", 8, seed=1))
    tables: dict[str, Any] = {"data": {"train": victim}, "session": {"record": ["provider"]}}
    config = cut_config("split", tmp_path / "run", deep_model("llama"), **tables)
    ask(config, PROMPTS[0])
    found = attack_run(tmp_path / "run", make_attack("vocabulary_matching"))
    values = {each.metric: each for each in found.findings}
    assert found.phase == "generation"
    assert values["token_recovery"].value >= 0.95
    assert values["token_recovery"].leaky_control >= 0.95
    assert values["token_recovery"].shuffled_control < 0.3
    assert PROMPTS[0] in found.samples[0].truth
    assert values["exact"].value == 1.0, "the answer's tokens too"
    assert not (tmp_path / "run" / RESULT).exists()


def test_without_what_was_asked_a_generation_cannot_be_scored(recorded: Record, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(recorded("online"), run)
    (run / "transcript" / ASKED).unlink()
    with pytest.raises(UserError, match="recorded passes are not those"):
        texts_of(run, "generation")
    (run / "transcript" / ASKED).write_text('{"prompt": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 1: KeyError"):
        read_asked(run)


def test_nothing_is_kept_of_what_was_asked_where_no_transcript_is(tmp_path: Path) -> None:
    keep_asked(tmp_path, {"prompt": "secret", "tokens": [1]})
    assert list(tmp_path.iterdir()) == []
    assert read_asked(tmp_path) == []


# --- what attacks say of themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
def test_what_an_attack_knows_follows_from_what_it_takes(name: str) -> None:
    kind = ATTACKS[name]
    theirs = {"public_ancestor", "ancestor_model", "base_weights"} if kind.observer == "host" else set[str]()
    if "known_pairs" in kind.auxiliary:
        expected = "known_plaintext"
    elif theirs & kind.auxiliary:
        expected = "public_ancestor"
    else:
        expected = "public_text" if "corpus" in kind.auxiliary else "nothing"
    assert kind.knows == expected
    assert kind.knows in ALL_KNOWS
    assert kind.phases <= set(ALL_PHASES)


def test_an_ancestor_is_copied_into_a_model_only_where_its_blocks_are_run(
    recorded: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veiltune.evaluation import attacking

    def copies(*_: Any) -> Any:
        raise AssertionError("a whole model was copied")

    monkeypatch.setattr(attacking, "ancestor_model", copies)
    found = attacked(recorded("obfuscatune"), "procrustes", distance=0.0)
    assert found["weight_cosine"].value > 0.99
    procrustes, plaintext = make_attack("procrustes"), make_attack("known_plaintext")
    assert "ancestor_model" in procrustes.takes("veil", 1)
    assert "ancestor_model" not in procrustes.takes("veil", 0)
    assert ("base_weights" in plaintext.takes("veil", 1), "base_weights" in plaintext.takes("veil", 0)) == (True, False)


def test_questions_are_drawn_whatever_the_order_they_were_asked_in() -> None:
    """The scorer asks in order of length. Means of the first twelve of 400, over 20 seeds, lie about the mean of all."""
    asked = [TrueRow(number, 0, (1,) * (5 + number), (1,), (0,)) for number in range(400)]
    assert drawn(asked, 3) == drawn(asked, 3)
    assert sorted(row.number for row in drawn(asked, 3)) == list(range(400))
    means = [sum(row.number for row in drawn(asked, seed)[:12]) / 12 for seed in range(20)]
    deviation = 400 / (12 * 12) ** 0.5  # of a mean of 12 numbers spread evenly over 0 to 400
    assert all(abs(mean - 199.5) < 4 * deviation for mean in means)
    assert len({round(mean) for mean in means}) > 10
