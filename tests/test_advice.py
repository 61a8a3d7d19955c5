"""Advice comes from records alone: what meets stated needs, in what order, and why the rest does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from commands import runner
from veiltune.errors import UserError
from veiltune.evaluation.advice import Advice, advise
from veiltune.evaluation.advice_needs import Needs, read_needs
from veiltune.results import Cost, Machine, Measurement, RunResult, Spread
from veiltune.study_records import AttackCell, AttackFigure, NothingCrossed, RunCell, append_record

MODEL, TASK = "package:tiny", "quiz"
MEASURED: dict[str, tuple[float, float, float]] = {
    "local": (0.50, 1000, 1.0),
    "obfuscatune": (0.49, 9000, 2.0),
    "online": (0.45, 300, 1.5),
    "gradfree": (0.40, 100, 1.2),
}
"""By design: utility, bytes a step, seconds a step."""
LEAKS: dict[str, tuple[str, float]] = {
    "obfuscatune": ("host", 0.3),
    "online": ("provider", 0.6),
    "gradfree": ("provider", 0.15),
}
"""By design: who was attacked, and ROUGE-L."""
ABOUT = 0.05
"""Half of every interval."""


def cost(design: str, num_bytes: float, seconds: float) -> Cost:
    cut = design not in {"local", "obfuscatune"}
    return Cost(
        seconds_per_step=Spread(median=seconds, p10=seconds, p90=1.1 * seconds, n=5),
        bytes={"owner->provider": {"TrunkForward": 4000}, "provider->owner": {"TrunkOutput": 6000}} if cut else {},
        bytes_per_step=num_bytes,
        peak_rss={"owner": 2_000_000, "provider": 5_000_000},
        revealed_param_share={"owner": 0.3} if cut else {"host": 1.0 if design == "local" else 0.001},
    )


def run_cell(design: str, task: str = TASK, **changes: Any) -> RunCell:
    value, num_bytes, seconds = MEASURED[design]
    value = changes.pop("value", value)
    interval = changes.pop("ci95", (value - ABOUT, value + ABOUT))
    result = RunResult(
        design=design,
        model=MODEL,
        config={},
        fingerprint="f",
        versions={},
        machine=Machine(platform="x", cpu_count=1, memory_bytes=1),
        utility={f"{task}/acc": Measurement(value=value, n=100, ci95=interval)},
        cost=cost(design, num_bytes, seconds),
        simulated_enclave=design == "obfuscatune",
    )
    base: dict[str, Any] = {
        "cell": f"{design}/{task}",
        "design": design,
        "setting": design,
        "model": MODEL,
        "task": task,
        "seed": 0,
    }
    filled: dict[str, Any] = {
        "status": "ok",
        "seconds": 1.0,
        "measured_at": "2026-01-01",
        "result": result,
    }
    return RunCell(**{**base, **filled, **changes})


def attack_cell(design: str, task: str = TASK, **changes: Any) -> AttackCell:
    observer, value = LEAKS[design]
    value = changes.pop("value", value)
    metric = changes.pop("metric", "rougeL")
    interval = changes.pop("ci95", (value - ABOUT, value + ABOUT))
    figure = AttackFigure(value=value, n=8, ci95=interval, leaky_control=1.0, shuffled_control=0.0)
    base: dict[str, Any] = {
        "design": design,
        "setting": design,
        "model": MODEL,
        "task": task,
        "seed": 0,
        "run": f"{design}/{task}",
    }
    filled: dict[str, Any] = {
        "cell": f"{design}/{task}/attack",
        "attack": "guess",
        "moment": "first",
        "observer": observer,
        "status": "ok",
        "seconds": 1.0,
        "measured_at": "2026-01-01",
        "figures": {metric: figure},
    }
    return AttackCell(**{**base, **filled, **changes})


def everything() -> list[RunCell | AttackCell]:
    return [*(run_cell(design) for design in MEASURED), *(attack_cell(design) for design in LEAKS)]


def write(path: Path, records: list[RunCell | AttackCell]) -> Path:
    for record in records:
        append_record(path / "results.jsonl", record)
    return path


def advised(tmp_path: Path, needs: Mapping[str, Any], records: list[RunCell | AttackCell] | None = None) -> Advice:
    directory = write(tmp_path / "study", everything() if records is None else records)
    return advise(Needs.model_validate({"model": MODEL, "resources": {"tee": True}, **needs}), directory)


def names(advice: Advice) -> list[str]:
    return [each.design for each in advice.advised]


def why(advice: Advice, design: str) -> str:
    (found,) = [each for each in advice.refused if each.design == design]
    return " | ".join(str(check) for check in found.refusals)


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_without_needs_all_recorded_designs_stand_ranked_by_loss(tmp_path: Path) -> None:
    advice = advised(tmp_path, {})
    assert names(advice) == ["local", "obfuscatune", "online", "gradfree"]
    assert advice.refused == ()
    assert "least loss" in advice.rule


@pytest.mark.parametrize(
    ("rank", "first"),
    [("bytes", "gradfree"), ("seconds", "local"), ("privacy", "gradfree"), ("utility", "local")],
)
def test_the_ranking_is_the_one_asked_for(rank: str, first: str, tmp_path: Path) -> None:
    assert names(advised(tmp_path, {"rank": [rank]}))[0] == first


@pytest.mark.parametrize(
    ("confidence", "bound", "kept"),
    [("point", 0.3, True), ("interval", 0.3, False), ("interval", 0.351, True), ("point", 0.29, False)],
)
def test_a_ceiling_on_text_is_kept_by_the_figure_or_the_whole_interval(
    confidence: str, bound: float, kept: bool, tmp_path: Path
) -> None:
    advice = advised(tmp_path, {"confidence": confidence, "observer": {"host": {"text": bound}}})
    assert ("obfuscatune" in names(advice)) is kept
    check = next(c for each in (*advice.advised, *advice.refused) if each.design == "obfuscatune" for c in each.checks)
    assert check.by == confidence
    assert check.measured == pytest.approx(0.3 if confidence == "point" else 0.35)
    if not kept:
        assert f"breaks at most {bound:g}" in why(advice, "obfuscatune")
        assert "guess, knowing not stated, gets rougeL 0.300 [0.250, 0.350]" in why(advice, "obfuscatune")


def test_the_designs_own_table_decides_where_it_can(tmp_path: Path) -> None:
    advice = advised(tmp_path, {"observer": {"host": {"text": 0.5}}})
    assert names(advice) == ["obfuscatune", "online", "gradfree"]
    assert "gets the text as it is" in why(advice, "local")
    cut = next(each for each in advice.advised if each.design == "online")
    assert cut.checks[0].by == "design"
    assert "no message that depends on the text" in cut.checks[0].reason


def test_the_strongest_attack_counts_by_the_asked_end(tmp_path: Path) -> None:
    wide = attack_cell("gradfree", cell="wide", attack="wide", value=0.1, ci95=(0.0, 0.9))
    both = [*everything(), wide]
    for confidence, by in (("point", "guess"), ("interval", "wide")):
        advice = advised(
            tmp_path / confidence, {"confidence": confidence, "observer": {"provider": {"text": 0.05}}}, both
        )
        assert f"{by}, knowing not stated, gets rougeL" in why(advice, "gradfree")


def test_only_what_the_observer_is_taken_to_know_counts(tmp_path: Path) -> None:
    records = [
        *(run_cell(design) for design in MEASURED),
        attack_cell("online", knows="nothing", value=0.1),
        attack_cell("online", cell="2", attack="learned", knows="public_text", value=0.4),
        attack_cell("online", cell="3", attack="asked", knows="nothing", phase="questions", value=0.8),
    ]

    def refused(directory: str, **stated: Any) -> str:
        advice = advised(tmp_path / directory, {"observer": {"provider": {"text": 0.3, **stated}}}, records)
        return "" if "online" in names(advice) else why(advice, "online")

    assert "asked, knowing nothing, gets rougeL 0.800" in refused("a")
    assert "learned of tuning texts, knowing public text, gets rougeL 0.400" in refused("b", phases=["tuning"])
    assert "learned of tuning" in refused("c", phases=["tuning"], knows=["public_ancestor"]), "who has more has that"
    assert refused("d", phases=["tuning"], knows=[]) == ""
    assert "asked of questions" in refused("e", phases=["tuning", "questions"], knows=[])
    assert "no attack of this observer reconstructs text of generation" in refused("f", phases=["generation"])


def test_texts_that_never_crossed_are_kept_by_the_transcript_and_returned_layers_are_no_record(tmp_path: Path) -> None:
    needs = {"observer": {"provider": {"text": 0.0, "phases": ["tuning"]}}}
    for returned, kept in ((0, True), (1, False)):
        nothing = NothingCrossed(passes=0, others=5, returned=returned)
        cells = [attack_cell("gradfree", figures={}, phase="tuning", knows="nothing", nothing=nothing)]
        advice = advised(tmp_path / str(returned), needs, [*(run_cell(design) for design in MEASURED), *cells])
        assert ("gradfree" in names(advice)) is kept
        if kept:
            (check,) = next(each for each in advice.advised if each.design == "gradfree").checks[:1]
            assert (check.by, check.measured) == ("transcript", 0.0)
        else:
            assert "layers tuned on the text" in why(advice, "gradfree")


@pytest.mark.parametrize(("confidence", "kept"), [("point", ["local", "obfuscatune"]), ("interval", [])])
def test_a_floor_of_utility(confidence: str, kept: list[str], tmp_path: Path) -> None:
    advice = advised(tmp_path, {"confidence": confidence, "utility": {"floor": 0.48}})
    assert names(advice) == kept
    assert "at least 0.48" in why(advice, "online")


def test_a_largest_loss_is_against_the_baseline(tmp_path: Path) -> None:
    advice = advised(tmp_path, {"confidence": "point", "utility": {"largest_loss": 0.06}})
    assert names(advice) == ["local", "obfuscatune", "online"]
    assert "difference -0.100" in why(advice, "gradfree")
    assert advice.advised[0].checks[0].by == "design"


@pytest.mark.parametrize(
    ("resources", "kept", "reason"),
    [
        ({"tee": False}, ["local", "online", "gradfree"], "needs an enclave"),
        ({"tee": True, "bytes_per_step": 2000}, ["local", "online", "gradfree"], "9,000 bytes a step"),
        ({"tee": True, "seconds_per_step": 1.7}, ["local", "online", "gradfree"], "2.2 s a step"),
        ({"tee": True, "owner_memory_bytes": 1}, [], "2e+06 bytes at the owner"),
        (
            {"tee": True, "owner_bits_per_second": 8000, "transfer_seconds": 10},
            ["online", "gradfree"],
            "no record: it was not measured",
        ),
    ],
)
def test_resources(resources: dict[str, Any], kept: list[str], reason: str, tmp_path: Path) -> None:
    advice = advised(tmp_path, {"resources": resources})
    assert names(advice) == kept
    assert reason in why(advice, "obfuscatune")


def test_weights(tmp_path: Path) -> None:
    advice = advised(tmp_path, {"observer": {"host": {"weight_share": 0.01}, "owner": {"weight_share": 0.2}}})
    assert names(advice) == ["obfuscatune"]
    assert "1 of the parameters are in the clear" in why(advice, "local")
    assert "0.3 of the parameters" in why(advice, "online")
    stolen = advised(tmp_path / "b", {"observer": {"host": {"weight_cosine": 0.5}}})
    assert "no record: no attack on the weights" in why(stolen, "obfuscatune")
    assert "gets weights as they are" in why(stolen, "local")
    attack = attack_cell("obfuscatune", cell="w", attack="align", metric="weight_cosine", value=0.2)
    kept = advised(tmp_path / "c", {"observer": {"host": {"weight_cosine": 0.5}}}, [*everything(), attack])
    assert names(kept) == ["obfuscatune", "online", "gradfree"]


# --- never without a record -------------------------------------------------------------------------------------------

TEXT = {"observer": {"host": {"text": 0.9}, "provider": {"text": 0.9}}}


@pytest.mark.parametrize("status", ["failed", "withheld"])
def test_an_attack_without_a_figure_is_no_record(status: Literal["failed", "withheld"], tmp_path: Path) -> None:
    records = [*everything()[:-1], attack_cell("gradfree", status=status, error="the control failed", figures={})]
    advice = advised(tmp_path, TEXT, records)
    assert names(advice) == ["obfuscatune", "online"]
    assert f"no record: {status}: the control failed" in why(advice, "gradfree")


def test_an_attack_that_was_never_made_is_no_record(tmp_path: Path) -> None:
    advice = advised(tmp_path, TEXT, everything()[:-1])
    assert "no record: missing" in why(advice, "gradfree")


def test_a_failed_run_is_refused_once_and_whatever_is_asked(tmp_path: Path) -> None:
    records = [r for r in everything() if r.design != "online"]
    advice = advised(tmp_path, {}, [*records, run_cell("online", status="failed", error="diverged", result=None)])
    assert "no record: failed: diverged" in why(advice, "online")
    assert "online" not in names(advice)


def test_a_task_that_was_not_run_is_no_record(tmp_path: Path) -> None:
    advice = advised(tmp_path, {}, [*everything(), run_cell("local", "exam")])
    assert advice.tasks == (TASK, "exam")
    assert names(advice) == ["local"]
    assert "(exam): no record" in why(advice, "online")
    only = advised(tmp_path / "b", {"tasks": [TASK]}, [*everything(), run_cell("local", "exam")])
    assert len(only.advised) == 4


def test_no_interval_keeps_no_bound_by_the_interval(tmp_path: Path) -> None:
    records = [*everything()[:-1], attack_cell("gradfree", ci95=None)]
    assert "without an interval" in why(advised(tmp_path, TEXT, records), "gradfree")
    assert "gradfree" in names(advised(tmp_path / "b", {**TEXT, "confidence": "point"}, records))


def test_reservations_are_told(tmp_path: Path) -> None:
    second = attack_cell("online", cell="2", attack="stronger", status="withheld", error="weak", figures={})
    advice = advised(tmp_path, TEXT, [*everything(), second])
    notes = {each.design: " ".join(each.notes) for each in advice.advised}
    assert "SIMULATED" in notes["obfuscatune"]
    assert "stronger (quiz) gave no figure: withheld: weak" in notes["online"]


def test_records_of_another_model_or_task_or_none_are_an_error(tmp_path: Path) -> None:
    for needs, message in (
        ({"model": "package:tini"}, "no record of model"),
        ({"tasks": ["quizz"]}, "no record of task"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            advised(tmp_path / message[-5:], needs)
        assert "did you mean" in str(caught.value.hint)
    with pytest.raises(UserError, match="no records") as caught:
        advise(Needs(model=MODEL))
    assert "veiltune compare" in str(caught.value.hint)
    with pytest.raises(UserError, match="cannot read"):
        advise(Needs(model=MODEL), tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="holds no record"):
        advise(Needs(model=MODEL), tmp_path / "empty.jsonl")


# --- the file, the verb -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[observr.host]\ntext = 0.1", "observr"),
        ("[observer.host]\ntxt = 0.1", "observer.host.txt"),
        ("[observer.host]\ntext = 1.5", "observer.host.text"),
        ('[observer.host]\nknows = ["everything"]', "observer.host.knows"),
        ("[observer.host]\nphases = []", "observer.host.phases"),
        ("[observer.cloud]\ntext = 0.5", "observer"),
        ("[observer.owner]\ntext = 0.5", "the owner's own"),
        ("[observer.provider]\nweight_share = 0.5", "the provider's own"),
        ("[resources]\ntransfer_seconds = 5", "go together"),
        ("rank = []", "rank"),
        ('confidence = "sure"', "confidence"),
    ],
)
def test_bad_needs_are_refused_by_name(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "needs.toml"
    path.write_text(f'model = "m"\n{line}\n', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_needs(path)
    assert message in caught.value.message


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    veiltune = runner(capsys)
    write(tmp_path / "study", everything())
    path = tmp_path / "needs.toml"
    path.write_text(
        f'model = "{MODEL}"\nrecords = "study"\nconfidence = "point"\n[observer.host]\ntext = 0.2\n[resources]\ntee = true\n',
        encoding="utf-8",
    )
    ran = veiltune("advise", str(path), "--json")
    assert ran.code == 0
    assert [each["design"] for each in ran.json["advised"]] == ["online", "gradfree"]
    refused = {each["design"]: each["refusals"] for each in ran.json["refused"]}
    assert set(refused) == {"local", "obfuscatune"}
    assert all(reasons for reasons in refused.values())
    people = veiltune("advise", str(path))
    assert people.out == ""
    assert "ranked by" in people.err
    assert "refused because" in people.err
    none = tmp_path / "none.toml"
    none.write_text(path.read_text(encoding="utf-8") + "bytes_per_step = 1\n", encoding="utf-8")
    assert "No recorded design meets" in veiltune("advise", str(none)).err
    json.dumps(veiltune("advise", str(none), "--records", str(tmp_path / "study"), "--json").json)
