"""README and docs quote no figure that a committed benchmark result does not hold."""

from __future__ import annotations

import pytest

from benchmarks import claims, tables
from benchmarks._record import Row
from veiltune.designs import DESIGNS


def test_pages_show_the_committed_results() -> None:
    assert tables.stale() == [], "run: python -m benchmarks.tables"


def test_a_changed_figure_is_found() -> None:
    page = "before\n<!-- figures: enclave_shares -->\n| made up |\n<!-- /figures -->\nafter\n"
    made = tables.rendered(page)
    assert "made up" not in made
    assert "GPT-2" in made or "gpt2" in made
    assert tables.rendered(made) == made


FOUND: Row = {
    "attack": "vocabulary_matching",
    "observer": "provider",
    "design": "online",
    "setting": "int8",
    "metric": "rougeL",
    "value": 0.87,
    "ci95": [0.8, 0.91],
    "leaky_control": 0.99,
    "shuffled_control": 0.05,
}


def attacks_of(monkeypatch: pytest.MonkeyPatch, rows: list[Row]) -> str:
    monkeypatch.setattr(tables, "rows_of", lambda name: rows if name == "attacks" else [])
    return tables.TABLES["claims_attacks"]()


def test_unmeasured_attacks_are_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No attack has been measured" in attacks_of(monkeypatch, [])
    assert "No attack has been measured" not in attacks_of(monkeypatch, [FOUND])


def test_an_attack_is_shown_with_interval_and_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [{**FOUND, "metric": "bag_f1", "value": 0.11}, {**FOUND, "metric": "token_recovery", "value": 0.22}]
    made = attacks_of(monkeypatch, [*others, FOUND])
    assert "0.87 (0.80–0.91) | 0.99 | 0.05" in made
    assert "0.11" not in made, "a lesser metric beside the headline"
    assert "0.22 (" in attacks_of(monkeypatch, others), "the next metric where there is no ROUGE-L"


def test_a_withheld_attack_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    made = attacks_of(monkeypatch, [{"attack": "x", "setting": "s", "withheld": "the leaky control failed"}])
    assert "withheld | the leaky control failed" in made


@pytest.mark.parametrize("reason", ["withheld", "failed", "missing"])
def test_a_cell_without_figures_says_why_and_is_no_zero(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both benchmarks the rows stand together, and a figure beats what was not measured."""
    heading = {key: FOUND[key] for key in ("attack", "observer", "design", "setting")}
    empty = {**heading, "attack": "learned_inverter", "knows": "public_text", "phase": "tuning", reason: "too slow"}
    rows = {"attacks": [FOUND | {"n": 8}], "strong_attacks": [empty]}
    monkeypatch.setattr(tables, "rows_of", lambda name: rows.get(name, []))
    made = tables.TABLES["claims_attacks"]()
    assert "0.87 (0.80–0.91)" in made
    assert f"| {reason} | too slow | – | – |" in made
    told = [line for line in tables.TABLES["leaks"]().splitlines() if "public text" in line]
    assert len(told) == (0 if reason == "missing" else 1), "what nobody tried yet stands in the whole table alone"
    assert "0.00" not in "".join(told)
    rows["strong_attacks"].append({**FOUND, **heading, "n": 8, "attack": "ridge_inverter", "value": 0.44})
    told = [line for line in tables.TABLES["leaks"]().splitlines() if "public text" in line]
    assert [("0.44" in line) for line in told] == [True]


def test_emulators_and_weights_are_no_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"attack": "emulator_misuse", "observer": "owner", "design": "offline", "setting": "s", "withheld": "why"}
    monkeypatch.setattr(tables, "rows_of", lambda name: [FOUND | {"n": 8}, row] if name == "attacks" else [])
    assert "emulator_misuse" not in tables.TABLES["leaks"]()
    assert "emulator_misuse" in tables.TABLES["claims_attacks"]()


def test_attackers_are_told_apart_by_what_they_know_and_are_after(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {**FOUND, "n": 8}
    learned = {**first, "attack": "ridge_inverter", "value": 0.44}
    asked = {**first, "phase": "questions", "value": 0.95}
    counted = {"passes": 0, "others": 7, "returned": 1}
    nothing = {**{key: FOUND[key] for key in ("attack", "observer", "setting")}, "design": "offline", "phase": "tuning"}
    other = {**first, "design": "offline", "setting": "other"}
    rows = [first, learned, asked, {**nothing, "nothing": counted}, other]
    monkeypatch.setattr(tables, "rows_of", lambda name: rows if name == "attacks" else [])
    lines = [line for line in tables.TABLES["leaks"]().splitlines() if line.startswith("| `")]
    assert [line.split(" | ")[3:5] for line in lines] == [
        ["tuning texts", "nothing"],
        ["tuning texts", "public text"],
        ["questions", "nothing"],
        ["tuning texts", "nothing"],
        ["tuning texts", "nothing"],
        ["questions", "nothing"],
    ]
    assert [("0.87" in line, "0.44" in line, "0.95 (" in line) for line in lines[:3]] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert "nothing crossed: 0 of 7 passes; 1 message(s) with layers tuned on them" in lines[3]
    assert "not counted yet" in lines[4]
    assert "recorded passes | nothing crossed: 0 of 7" in tables.TABLES["claims_attacks"]()


def test_errors_stand_beside_their_bounds_and_one_beyond_is_marked() -> None:
    row = {"design": "obfuscatune", "matrix": "orthogonal", "condition_number": 1.0, "dtype": "float32"}
    for error, verdict in ((1e-6, "| within |"), (1e-2, "**beyond**")):
        made = claims.exact(lambda _, e=error: [{**row, "logit_error": e}], tables._markdown)
        assert verdict in made
    coarse = claims.exact(lambda _: [{**row, "dtype": "bfloat16", "logit_error": 0.1}], tables._markdown)
    assert "void" in coarse


def test_what_is_not_protected_is_the_designs_own_table() -> None:
    made = tables.TABLES["claims_not_protected"]()
    for name, design in DESIGNS.items():
        for observer in {"host", "provider"} & set(design.reveals):
            for reveal in design.reveals[observer].values():
                assert (reveal.what in made) or reveal.form != "clear", (name, observer)
    assert "Q, K and V" in made
