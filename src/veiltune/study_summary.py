"""What a comparison's records say, row by row: the one place where they are aggregated.

A row is a model, a design, a setting and a task, over all seeds. Nothing is averaged over tasks, which are unlike. Reports
draw rows and advice compares them; neither aggregates again. ::

    rows = summarise(read_study(path))
    row.utility          # Estimate | Absent
    row.difference       # to the unprotected baseline of the same task: Estimate | Absent | None (the row is unprotected)
    row.worst["host"]    # Worst | Absent: the strongest text reconstruction from what that observer saw
    row.exposure         # Exposure | Absent: the strongest over all observers
    row.cost             # CostSummary | Absent
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from veiltune.results import Cost, EnclaveCost, Measurement, RunResult, Spread
from veiltune.study_records import AttackCell, RunCell, runs_of
from veiltune.study_rows import (
    STATE_METRIC,
    TEXT_METRICS,
    WEIGHT_METRIC,
    AttackRow,
    CostSummary,
    DesignFacts,
    Exposure,
    Row,
    Worst,
)
from veiltune.study_values import Absent, Controlled, Estimate, controlled, difference, pooled

__all__ = [
    "STATE_METRIC",
    "TEXT_METRICS",
    "WEIGHT_METRIC",
    "Absent",
    "AttackRow",
    "Controlled",
    "CostSummary",
    "DesignFacts",
    "Estimate",
    "Exposure",
    "Row",
    "Worst",
    "design_facts",
    "settings_of",
    "summarise",
]

Records = Sequence[RunCell | AttackCell]
RowKey = tuple[str, str, str, str]
"""Model, design, setting, task."""


@lru_cache
def design_facts(name: str) -> DesignFacts:
    """Facts of a design by its name; of an unknown one (a record of another version), none."""
    from veiltune.designs import DESIGNS

    design = DESIGNS.get(name)
    if design is None:
        return DesignFacts()
    others = {who: kinds for who, kinds in design.reveals.items() if who != "owner" and who not in design.enclaves}
    clear = {who for who, kinds in others.items() if "TrainBatch" in kinds and kinds["TrainBatch"].form == "clear"}
    seen = [who for who, kinds in others.items() if any(each.form in {"clear", "masked"} for each in kinds.values())]
    return DesignFacts(
        observers=tuple(seen),
        clear_to=tuple(who for who in others if who in clear),
        trained=design.baseline.get("layers", "all"),
        needs_enclave=bool(design.enclaves),
    )


def summarise(records: Records) -> list[Row]:
    """The rows of a comparison, in the order in which their designs and settings first appear.

    Every design and setting gets a row for every task of its model; where no run was recorded, the row says so. Of several
    records of one cell the last counts.
    """
    latest = list({record.cell: record for record in records}.values())
    runs = runs_of(latest)
    attacks = [record for record in latest if isinstance(record, AttackCell)]
    settings = dict.fromkeys((each.model, each.design, each.setting) for each in latest)
    tasks = dict.fromkeys((each.model, each.task) for each in latest)
    seeds = sorted({run.seed for run in runs})
    rows = [
        _row(
            (*setting, task),
            [run for run in runs if _key(run) == (*setting, task)],
            [each for each in attacks if (each.model, each.design) == setting[:2]],
            seeds,
        )
        for setting in settings
        for model, task in tasks
        if model == setting[0]
    ]
    return [_compared(row, rows) for row in rows]


def settings_of(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by model, design and setting: one entry's rows differ in the task alone."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.model, row.design, row.setting), []).append(row)
    return found


def _key(cell: RunCell | AttackCell) -> RowKey:
    return cell.model, cell.design, cell.setting, cell.task


# --- one row ----------------------------------------------------------------------------------------------------------


def _row(key: RowKey, runs: Sequence[RunCell], attacks: Sequence[AttackCell], seeds: Sequence[int]) -> Row:
    """The row of a key; ``attacks`` are those on the design in any setting and on any task."""
    model, design, setting, task = key
    done = [(run.seed, run.result) for run in runs if run.status == "ok" and run.result is not None]
    results = [result for _, result in done]
    bad = [run for run in runs if run.status != "ok" or run.result is None]
    absent = None if results else _why(bad)
    metric = _metric(task, results)
    facts = design_facts(design)
    rows = _attack_rows(key, attacks, absent)
    return Row(
        model=model,
        design=design,
        setting=setting,
        task=task,
        options=runs[0].options if runs else {},
        facts=facts,
        seeds=tuple(seed for seed, _ in done),
        notes=_notes(runs, seeds) if results else (),
        absent=absent,
        metric=metric.rpartition("/")[2],
        utility=_pool([result.utility for result in results], metric)
        or absent
        or Absent("missing", "the run measured no utility"),
        before=_pool([result.utility_before for result in results], metric),
        on_emulator=_pool([result.utility_emulator for result in results], metric),
        baseline=None,
        difference=None,
        attacks=rows,
        worst=_worst(rows, facts, absent or Absent("missing", "no attack")),
        worst_weights=_worst_weights(rows),
        cost=_cost(results) if results else absent or Absent("missing"),
        simulated=any(result.simulated_enclave for result in results),
        reproducible=any(result.labels.reproducible_secrets for result in results),
    )


def _why(bad: Sequence[RunCell | AttackCell]) -> Absent:
    """Why there is no figure, told by the first of the cells that have none."""
    if not bad:
        return Absent("missing")
    first = bad[0]
    if first.status == "withheld":
        return Absent("withheld", first.error or "control failed")
    return Absent("failed", first.error or "no reason recorded")


def _notes(cells: Sequence[RunCell | AttackCell], seeds: Sequence[int]) -> tuple[str, ...]:
    """What befell seeds that gave no figure, where others did."""
    notes = [f"seed {cell.seed} {cell.status}: {cell.error}" for cell in cells if cell.status != "ok"]
    missing = sorted(set(seeds) - {cell.seed for cell in cells})
    return (*notes, *(f"seed {seed} missing" for seed in missing))


def _metric(task: str, results: Sequence[RunResult]) -> str:
    """The task's metric: the one with an interval, of the task itself before any other."""
    names = dict.fromkeys(name for result in results for name in result.utility)
    with_interval = [name for name in names if any(r.utility.get(name, _NONE).ci95 for r in results)]
    of_task = [name for name in with_interval if name.rpartition("/")[0] == task]
    return next(iter([*of_task, *with_interval, *names]), "")


_NONE = Measurement(value=0.0, n=1, ci95=None)


def _pool(utilities: Sequence[Mapping[str, Measurement]], metric: str) -> Estimate | None:
    found = [utility[metric] for utility in utilities if metric in utility]
    return pooled(found) if found else None


# --- attacks ----------------------------------------------------------------------------------------------------------


def _attack_rows(key: RowKey, attacks: Sequence[AttackCell], no_run: Absent | None) -> tuple[AttackRow, ...]:
    """Every attack that was tried on the design anywhere, with what it came to here."""
    tried = dict.fromkeys((each.attack, each.attack_setting, each.moment, each.observer) for each in attacks)
    seeds = sorted({each.seed for each in attacks})
    here = [each for each in attacks if _key(each) == key]
    rows: list[AttackRow] = []
    for heading in tried:
        cells = [c for c in here if (c.attack, c.attack_setting, c.moment, c.observer) == heading]
        done = [cell for cell in cells if cell.status == "ok" and cell.figures]
        names = dict.fromkeys(name for cell in done for name in cell.figures)
        rows.append(
            AttackRow(
                *heading,
                figures={name: controlled([c.figures[name] for c in done if name in c.figures]) for name in names},
                absent=None if done else (no_run if no_run and not cells else _why(cells)),
                notes=_notes(cells, seeds) if done else (),
                samples=next((tuple(cell.samples) for cell in done if cell.samples), ()),
            )
        )
    return tuple(rows)


def _worst(rows: Sequence[AttackRow], facts: DesignFacts, otherwise: Absent) -> dict[str, Worst | Absent]:
    """The strongest text reconstruction by observer; where nothing was measured, why, if only ``otherwise``."""
    found: dict[str, Worst | Absent] = {}
    for observer in dict.fromkeys([*facts.observers, *(row.observer for row in rows)]):
        if observer in facts.clear_to:
            continue
        mine = [row for row in rows if row.observer == observer]
        text = [Worst(row, row.text_metric) for row in mine if row.text_metric]
        states = [Worst(row, STATE_METRIC) for row in mine if STATE_METRIC in row.figures]
        strongest = _strongest(text or states)
        if strongest is not None:
            found[observer] = strongest
        elif observer in facts.observers or not any(row.figures for row in mine):
            found[observer] = next((row.absent for row in mine if row.absent), otherwise)
    return found


def _worst_weights(rows: Sequence[AttackRow]) -> dict[str, Worst]:
    found: dict[str, Worst] = {}
    for observer in dict.fromkeys(row.observer for row in rows):
        mine = [Worst(row, WEIGHT_METRIC) for row in rows if row.observer == observer and WEIGHT_METRIC in row.figures]
        strongest = _strongest(mine)
        if strongest is not None:
            found[observer] = strongest
    return found


def _strongest(found: Sequence[Worst]) -> Worst | None:
    return max(found, key=lambda each: each.figure.estimate.value, default=None)


# --- costs and baselines ----------------------------------------------------------------------------------------------


def _cost(results: Sequence[RunResult]) -> CostSummary:
    costs = [result.cost for result in results]
    processes = all(result.config.get("session", {}).get("processes", True) for result in results)
    peaks = [cost.peak_rss for cost in costs if cost.peak_rss]
    owners = [peak["owner"] for peak in peaks if "owner" in peak]
    wholes = [sum(peak.values()) if processes else max(peak.values()) for peak in peaks]
    links = {
        name: max(sum(cost.bytes.get(name, {}).values()) for cost in costs) for cost in costs for name in cost.bytes
    }
    return CostSummary(
        bytes_per_step=_largest([cost.bytes_per_step for cost in costs]),
        link_bytes=links,
        seconds_per_step=_spread([cost.seconds_per_step for cost in costs]),
        step_ratio=_spread([cost.step_ratio for cost in costs]),
        owner_peak=max(owners) if owners and processes else None,
        whole_peak=max(wholes, default=None),
        revealed=_revealed(costs),
        enclave=EnclaveCost(
            param_share=_largest([cost.enclave.param_share for cost in costs]),
            flop_share=_largest([cost.enclave.flop_share for cost in costs]),
            seconds_share=_largest([cost.enclave.seconds_share for cost in costs]),
        ),
        crossings_per_step=_largest([cost.crossings_per_step for cost in costs]),
    )


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _spread(spreads: Iterable[Spread | None]) -> Spread | None:
    present = [spread for spread in spreads if spread is not None]
    if not present:
        return None
    return Spread(
        median=statistics.median(spread.median for spread in present),
        p10=min(spread.p10 for spread in present),
        p90=max(spread.p90 for spread in present),
        n=sum(spread.n for spread in present),
    )


def _revealed(costs: Sequence[Cost]) -> dict[str, float]:
    observers = dict.fromkeys(name for cost in costs for name in cost.revealed_param_share)
    return {name: max(cost.revealed_param_share.get(name, 0.0) for cost in costs) for name in observers}


def _compared(row: Row, rows: Sequence[Row]) -> Row:
    """The row with the unprotected one that it is compared with: trained on the same layers, else on any.

    `local` itself is compared with nothing.
    """
    if row.design == "local":
        return row
    plain = [each for each in rows if (each.model, each.task, each.design) == (row.model, row.task, "local")]
    measured = [each for each in plain if isinstance(each.utility, Estimate)]
    same = [each for each in measured if each.options.get("layers", "all") == row.facts.trained]
    chosen = next(iter([*same, *measured]), None)
    if chosen is None:
        return replace(row, difference=Absent("missing", "no unprotected run of this task"))
    if isinstance(row.utility, Absent):
        return replace(row, baseline=chosen.setting, difference=row.utility)
    if not isinstance(chosen.utility, Estimate) or chosen.metric != row.metric:
        return replace(
            row, baseline=chosen.setting, difference=Absent("missing", "the baseline's metric is another one")
        )
    return replace(row, baseline=chosen.setting, difference=difference(row.utility, chosen.utility))
