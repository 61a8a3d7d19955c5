"""What a comparison's records say, row by row: the one place where they are aggregated.

A row is a model, a design, a setting and a task, over all seeds. Nothing is averaged over tasks, which are unlike. Reports
draw rows and advice compares them; neither aggregates again. ::

    rows = summarise(read_study(path))
    row.utility          # Estimate | Absent
    row.difference       # to the unprotected baseline of the same task: Estimate | Absent | None (the row is unprotected)
    row.worst            # by Attacker (observer, phase, knowledge): Worst | Uncrossed | Absent, never mixed
    row.exposure         # Exposure | Absent: the strongest of all; exposure_to(knows, phases): of some
    row.cost             # CostSummary | Absent
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from veiltune.results import Cost, EnclaveCost, Measurement, RunResult, Spread
from veiltune.study_attacks import (
    attack_rows,
    design_facts,
    knows_of,
    notes_of,
    phase_of,
    results_sent,
    why_absent,
    worst_by_attacker,
    worst_weights,
)
from veiltune.study_records import AttackCell, RunCell, runs_of
from veiltune.study_rows import (
    STATE_METRIC,
    TEXT_METRICS,
    WEIGHT_METRIC,
    Attacker,
    AttackRow,
    CostSummary,
    DesignFacts,
    Exposure,
    Row,
    Uncrossed,
    Worst,
)
from veiltune.study_values import Absent, Controlled, Estimate, difference, pooled

__all__ = [
    "STATE_METRIC",
    "TEXT_METRICS",
    "WEIGHT_METRIC",
    "Absent",
    "AttackRow",
    "Attacker",
    "Controlled",
    "CostSummary",
    "DesignFacts",
    "Estimate",
    "Exposure",
    "Row",
    "Uncrossed",
    "Worst",
    "design_facts",
    "knows_of",
    "phase_of",
    "settings_of",
    "summarise",
]

Records = Sequence[RunCell | AttackCell]
RowKey = tuple[str, str, str, str]
"""Model, design, setting, task."""


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
    absent = None if results else why_absent(bad)
    metric = _metric(task, results)
    facts = design_facts(design)
    rows = attack_rows([each for each in attacks if _key(each) == key], attacks, absent)
    return Row(
        model=model,
        design=design,
        setting=setting,
        task=task,
        options=runs[0].options if runs else {},
        facts=facts,
        seeds=tuple(seed for seed, _ in done),
        notes=notes_of(runs, seeds) if results else (),
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
        worst=worst_by_attacker(rows, facts, results_sent(results), absent or Absent("missing", "no attack")),
        worst_weights=worst_weights(rows),
        cost=_cost(results) if results else absent or Absent("missing"),
        simulated=any(result.simulated_enclave for result in results),
        reproducible=any(result.labels.reproducible_secrets for result in results),
    )


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

    A baseline itself is compared with nothing.
    """
    if row.is_baseline:
        return row
    plain = [each for each in rows if each.is_baseline and (each.model, each.task) == (row.model, row.task)]
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
