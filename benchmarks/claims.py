"""The blocks of the claims page that no other page has: exactness beside its bound, attacks, and what each design hands out.

See `benchmarks.tables` for how blocks get into pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks._record import Row
from veiltune.designs import DESIGNS
from veiltune.privacy.bounds import error_bound, product_bound
from veiltune.study_summary import design_facts, knows_of, phase_of
from veiltune.study_terms import ALL_KNOWS, ALL_PHASES, Knows, Phase, told_knows, told_phase

Rows = Callable[[str], list[Row]]
Markdown = Callable[[list[str], list[list[str]]], str]

WIDTH, PRODUCTS = 576, 4 * 30
"""Of the model that `condition_number` is measured on, SmolLM2-135M: hidden width, protected products one behind the other."""
NOTHING_MEASURED = (
    "*No attack has been measured in a committed benchmark yet. Until one is, nothing on this page says that any design hides a "
    "text or a weight from whoever receives its messages.*"
)
HEADLINES = (
    "rougeL",
    "token_recovery",
    "label_recovery",
    "unit_accuracy",
    "basis_correlation",
    "agreement",
    "weight_cosine",
    "state_cosine",
)
"""Metrics that are shown, where a row has them: of an attack the first."""
RESULTS_OF_ATTACKS = ("attacks", "strong_attacks", "gradient_attacks")
WITHOUT_FIGURES = ("withheld", "failed", "missing")
"""Keys of a row that says why an attack has no figures."""


def exact(rows_of: Rows, markdown: Markdown) -> str:
    """Measured errors beside c·κ·eps, by design."""
    measured = [row for row in rows_of("condition_number") if row["design"] != "local" and row["condition_number"]]
    lines: list[list[str]] = []
    for row in measured:
        eps = torch.finfo({"float32": torch.float32, "bfloat16": torch.bfloat16}[row["dtype"]]).eps
        bound = error_bound("logits", product_bound(WIDTH, row["condition_number"], eps), products=PRODUCTS)
        verdict = "**beyond**" if row["logit_error"] > bound else "within" if bound < 1 else "void: the bound exceeds 1"
        lines.append(
            [
                f"`{row['design']}`",
                row["matrix"],
                f"{row['condition_number']:.0f}",
                row["dtype"],
                f"{row['logit_error']:.1e}",
                f"{bound:.1e}",
                verdict,
            ]
        )
    return markdown(["design", "key", "κ", "dtype", "largest error of logits", "c·κ·eps", ""], lines)


def ancestry(rows_of: Rows, markdown: Markdown) -> str:
    """How far apart unrelated and related weights lie in the pre-flight's measure, over all kinds of key."""
    rows = rows_of("ancestry")
    lines: list[list[str]] = []
    for relation in dict.fromkeys(row["relation"] for row in rows):
        group = [row for row in rows if row["relation"] == relation]
        count, low, high = (
            sum(row["n"] for row in group),
            min(row["excess_low"] for row in group),
            max(row["excess_high"] for row in group),
        )
        residual, error = (
            sum(row["n"] * row[name] for row in group) / count for name in ("residual_mean", "weight_error_mean")
        )
        aligned = f"{sum(row['aligned'] for row in group)} of {count}"
        lines.append([relation, f"{low:.2f} to {high:.2f}", f"{residual:.2f}", f"{100 * error:.1f}%", aligned])
    return markdown(
        ["the other weights", "excess", "residual", "error of recovered weights", "keys called aligned"], lines
    )


Who = tuple[str, str, str, Phase | None, Knows | None]
"""Design, setting, observer, whose texts, what is known besides."""


def attacks(rows_of: Rows, markdown: Markdown) -> str:
    """What attacks got, with both controls; a sentence where nothing was measured."""
    rows = _all_rows(rows_of)
    if not rows:
        return NOTHING_MEASURED
    lines: list[list[str]] = []
    for row in _headlines(rows):
        _, _, _, phase, knows = _who(row)
        names = [f"`{row.get('design', '–')}`", str(row.get("setting", "–")), str(row.get("observer", "–"))]
        heading = [*names, told_phase(phase) or "–", told_knows(knows), row["attack"]]
        reason = next((key for key in WITHOUT_FIGURES if key in row), None)
        if reason or "nothing" in row:
            told = [reason, row[reason]] if reason else ["recorded passes", counted(row)]
            lines.append([*heading, *told, "–", "–"])
            continue
        lines.append([*heading, row["metric"], figure(row), *controls(row)])
    head = ["design", "setting", "observer", "after", "knows besides", "attack", "metric", "value (95%)"]
    return markdown([*head, "leaky", "shuffled"], lines)


def leaks(rows_of: Rows, markdown: Markdown) -> str:
    """The strongest text reconstruction by each attacker, by ROUGE-L, and of which attack it was.

    An attacker is an observer, the texts it is after, and what it knows: figures of two are never put together. One that nothing
    was measured of yet is not here but in the table of all attacks.
    """
    reasons = {"nothing", "withheld", "failed"}
    told = [row for row in _all_rows(rows_of) if row.get("metric") == "rougeL" or reasons & set(row)]
    texts = [row for row in told if "metric" in row or _who(row)[3] is not None]
    if not texts:
        return NOTHING_MEASURED
    lines: list[list[str]] = []
    for setting in dict.fromkeys(_who(row)[:3] for row in texts):
        groups: dict[Who, list[Row]] = {}
        for row in texts:
            if _who(row)[:3] == setting:
                groups.setdefault(_who(row), []).append(row)
        if design_facts(setting[0]).tunes_apart and not any(who[3] == "tuning" for who in groups):
            lines.append(
                [*_told((*setting, "tuning", "nothing")), "none crosses, by its table; not counted yet", "–", "–", "–"]
            )
        ordered = sorted(groups, key=lambda who: (_place(ALL_PHASES, who[3]), _place(ALL_KNOWS, who[4])))
        lines += [[*_told(who), *_strongest(groups[who])] for who in ordered]
    head = ["design", "setting", "observer", "after", "knows besides", "strongest attack", "ROUGE-L (95%)"]
    return markdown([*head, "leaky", "shuffled"], lines)


def _all_rows(rows_of: Rows) -> list[Row]:
    """Of every benchmark of attacks."""
    return [row for name in RESULTS_OF_ATTACKS for row in rows_of(name)]


def _who(row: Row) -> Who:
    """Who made an attack; of a result of an earlier version by the names of attack and design."""
    attack, design = row["attack"], str(row.get("design", "–"))
    setting = str(row.get("setting", "–")).partition(";")[0]
    observer = str(row.get("observer", "–"))
    return design, setting, observer, phase_of(attack, design, row.get("phase")), knows_of(attack, row.get("knows"))


def _told(who: Who) -> list[str]:
    design, setting, observer, phase, knows = who
    return [f"`{design}`", setting, observer, told_phase(phase) or "–", told_knows(knows)]


def _place(order: Sequence[str], name: str | None) -> int:
    return order.index(name) if name in order else len(order)


def _strongest(rows: list[Row]) -> list[str]:
    measured = [row for row in rows if "value" in row]
    if not measured:
        crossed = [counted(row) for row in rows if "nothing" in row]
        if crossed:
            return ["–", crossed[0], "–", "–"]
        why = {"withheld": "withheld: a control failed", "failed": "the attack failed", "missing": "not measured"}
        told = next(why[key] for key in WITHOUT_FIGURES for row in rows if key in row)
        return [f"`{rows[0]['attack']}`", told, "–", "–"]
    worst = max(measured, key=lambda row: row["value"])
    told = "; ".join([f"`{worst['attack']}`", *(part.strip() for part in worst["setting"].split(";")[1:])])
    return [told, figure(worst, f"n = {worst['n']}"), *controls(worst)]


def figure(row: Row, *more: str) -> str:
    """A value, in brackets its interval of 95%, if it has one, and what else is told of it."""
    ends = [] if row["ci95"] is None else ["–".join(f"{end:.2f}" for end in row["ci95"])]
    told = ", ".join([*ends, *more])
    return f"{row['value']:.2f} ({told})" if told else f"{row['value']:.2f}"


def controls(row: Row) -> list[str]:
    """The leaky and the shuffled one."""
    return [f"{row[name]:.2f}" for name in ("leaky_control", "shuffled_control")]


def counted(row: Row) -> str:
    """That nothing crossed, as it was counted."""
    found = row["nothing"]
    returned = f"; {found['returned']} message(s) with layers tuned on them" if found["returned"] else ""
    return f"nothing crossed: {found['passes']} of {found['passes'] + found['others']} passes{returned}"


def _headlines(rows: list[Row]) -> list[Row]:
    """One row an attack, design, setting and phase: its first metric of `HEADLINES`, or the reason why it has none."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        names = ("design", "setting", "observer", "attack", "phase")
        groups.setdefault(tuple(str(row.get(name)) for name in names), []).append(row)
    chosen: list[Row] = []
    for group in groups.values():
        by_metric = {row.get("metric"): row for row in group}
        found = next((by_metric[metric] for metric in HEADLINES if metric in by_metric), None)
        chosen.append(found or group[0])
    return chosen


def not_protected(markdown: Markdown) -> str:
    """What every design hands to host or provider readable, from the tables that channels enforce."""
    lines = [
        [f"`{name}`", who, "; ".join(readable)]
        for name, design in DESIGNS.items()
        for who in ("host", "provider")
        if who in design.reveals
        and (
            readable := [
                *(reveal.what for reveal in design.reveals[who].values() if reveal.form == "clear"),
                *design.also_sees.get(who, ()),
            ]
        )
    ]
    return markdown(["design", "observer", "has, readable or by what it computes itself"], lines)
