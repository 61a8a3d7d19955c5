"""A comparison's tables: at a glance, utility, privacy, cost, every attack, the settings. Pure functions of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from veiltune.report.comparison import bytes_text, percent, spread_text
from veiltune.report.studies.grid import Cell, Grid, shown
from veiltune.report.studies.words import (
    cost_text,
    difference_cell,
    estimate_cell,
    estimated,
    exposures_cell,
    figure,
    hardware_cell,
    interval,
    memory_text,
    revealed_text,
    seconds_text,
    status_cell,
)
from veiltune.study_rows import Attacker, AttackRow, CostSummary, Row, Uncrossed, Worst
from veiltune.study_summary import settings_of
from veiltune.study_terms import told_knows
from veiltune.study_values import Absent, Estimate

Maker = Callable[[str, Sequence[Row]], Grid]
"""Makes a table of one model's rows."""


def glance(model: str, rows: Sequence[Row]) -> Grid:
    """One line a design and setting, two columns a task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    headings = [
        name
        for task in tasks
        for name in (_utility_heading(task, rows), f"{task}: strongest reconstruction, by attacker")
    ]
    lines: list[list[Cell | str]] = []
    for entry in settings_of(rows).values():
        by_task = {row.task: row for row in entry}
        measured = [cell for task in tasks for cell in (_utility_cell(by_task[task]), _exposures(by_task[task]))]
        lines.append(
            [
                _name(entry[0]),
                *measured,
                _over(entry, cost_text),
                _over(entry, revealed_text),
                hardware_cell(next((row for row in entry if row.simulated), entry[0])),
                _states(entry),
            ]
        )
    columns = [
        "design: setting",
        *headings,
        "bytes a step, seconds a step, peak memory of owner / all",
        "parameters in the clear at",
        "hardware needed",
        "status",
    ]
    note = (
        "In brackets: 95% intervals. The difference is to the unprotected run of the same task that is named beside it. "
        "Costs that differ between tasks are given for each."
    )
    return Grid(f"{model}: every setting at a glance", columns, lines, note)


def utilities(model: str, rows: Sequence[Row]) -> Grid:
    """Utility of every row, with what it is compared with."""
    lines = [
        [
            _name(row),
            row.task,
            row.metric or shown(None),
            shown(estimate_cell(row.utility)),
            _count(row.utility),
            shown(difference_cell(row)),
            "" if row.is_baseline else row.baseline or shown(None),
            shown(estimate_cell(row.before)) if row.before else "not asked for",
            shown(estimate_cell(row.on_emulator)) if row.on_emulator else "",
            status_cell(row),
        ]
        for row in rows
    ]
    columns = (
        "design: setting",
        "task",
        "metric",
        "after tuning [95%]",
        "items × seeds",
        "to the unprotected run [95%]",
    )
    others = ("that run's setting", "before tuning", "on the emulator", "status")
    return Grid(f"{model}: utility", (*columns, *others), lines)


def privacy(model: str, rows: Sequence[Row]) -> Grid:
    """The strongest attack on every row, observer by observer, with its controls; of weights too, where one was tried."""
    lines: list[list[Cell | str]] = []
    for row in rows:
        clear = [
            (Attacker(who, None, None), "every text", [Cell("reads it by design", "loud"), *[""] * 5])
            for who in row.facts.clear_to
        ]
        text = [(who, who.phase or "text", _worst_cells(worst)) for who, worst in row.worst.items()]
        weights = [(who, "weights", _worst_cells(worst)) for who, worst in row.worst_weights.items()]
        lines.extend(
            [_name(row), row.task, who.observer, what, _knows(who), *cells]
            for who, what, cells in (*clear, *text, *weights)
        )
    columns = ("design: setting", "task", "observer", "of what", "knows besides", "strongest attack", "metric")
    return Grid(
        f"{model}: the strongest attack of each observer, by texts and by what it knows",
        (*columns, "value [95%]", "sequences × seeds", "leaky control", "shuffled control"),
        lines,
        "Attackers who know different things, or are after different texts, are shown apart: no line is the best of several. "
        "Leaky control: the same attack with protection off, where it must succeed. Shuffled control: against other texts, "
        "where it must fall to chance. An attack whose controls fail is withheld.",
    )


def costs(model: str, rows: Sequence[Row]) -> Grid:
    """What every row cost."""
    lines: list[list[Cell | str]] = []
    for row in rows:
        if isinstance(row.cost, Absent):
            lines.append([_name(row), row.task, *[shown(row.cost)] * 10])
        else:
            lines.append([_name(row), row.task, *(shown(text) for text in _cost_texts(row.cost)), hardware_cell(row)])
    columns = ("bytes a step", "bytes of the whole run, by link", "seconds a step", "ratio to the plain step")
    others = ("peak memory, owner / all", "parameters in the clear at", "parameters in the enclave")
    last = ("FLOPs in the enclave", "crossings a step", "hardware needed")
    return Grid(
        f"{model}: cost",
        ("design: setting", "task", *columns, *others, *last),
        lines,
        "Seconds: median (10th to 90th percentile). Peaks of processes are added, which bounds what they took at one time. "
        "Of several seeds the largest.",
    )


def attack_tables(model: str, rows: Sequence[Row]) -> dict[str, Grid]:
    """By attack: every figure of it, with its controls."""
    names = dict.fromkeys(attack.attack for row in rows for attack in row.attacks)
    columns = (
        "design: setting",
        "task",
        "observer",
        "of what",
        "knows besides",
        "texts",
        "settings",
        "metric",
        "value",
    )
    tables: dict[str, Grid] = {}
    for name in names:
        lines = [
            line for row in rows for each in row.attacks if each.attack == name for line in _attack_lines(row, each)
        ]
        tables[name] = Grid(
            f"{model}: {name}",
            (*columns, "95% interval", "sequences × seeds", "leaky control", "shuffled control", "status"),
            lines,
            "state_error and weight_error are relative errors: less is better for the attacker. Of all others, more is.",
        )
    return tables


def options(model: str, rows: Sequence[Row]) -> Grid:
    """What the settings' names stand for."""
    lines = [
        [_name(entry[0]), Cell("\n".join(f"{key} = {value}" for key, value in found.items()) or "defaults", "code")]
        for entry in settings_of(rows).values()
        for found in [next((row.options for row in entry if row.options), entry[0].options)]
    ]
    return Grid(f"{model}: what the settings are", ("design: setting", "options that are configured"), lines)


# --- parts ------------------------------------------------------------------------------------------------------------


def _name(row: Row) -> str:
    return row.label


def _utility_heading(task: str, rows: Sequence[Row]) -> str:
    metrics = dict.fromkeys(row.metric for row in rows if row.task == task and row.metric)
    return f"{task}: {' or '.join(metrics) or 'utility'}"


def _utility_cell(row: Row) -> Cell | str:
    if isinstance(row.utility, Absent):
        return _briefly(row.utility)
    text = estimated(row.utility)
    if row.difference is None:
        return f"{text}\nunprotected"
    beside = shown(difference_cell(row)).text
    return (
        f"{text}\n{beside}\nto local: {row.baseline}" if isinstance(row.difference, Estimate) else f"{text}\n{beside}"
    )


def _exposures(row: Row) -> Cell:
    """What observers could read; where there was no run, its status says why."""
    return _briefly(row.absent) if row.absent else shown(exposures_cell(row))


def _briefly(absent: Absent) -> Cell:
    """The status alone: the line's last cell gives the reason."""
    return Cell(absent.status, "absent")


def _over(entry: Sequence[Row], text: Callable[[CostSummary], str | None]) -> Cell:
    """A cost over the tasks of a setting; absent where no run of it has one."""
    found = {row.task: text(row.cost) for row in entry if isinstance(row.cost, CostSummary)}
    if not found:
        return _briefly(entry[0].cost) if isinstance(entry[0].cost, Absent) else shown(None)
    if len(set(found.values())) == 1:
        return shown(next(iter(found.values())))
    return Cell("\n".join(f"{task}:\n{shown(each).text}" for task, each in found.items()))


def _states(entry: Sequence[Row]) -> Cell:
    cells = [status_cell(row) for row in entry]
    if len({cell.text for cell in cells}) == 1:
        return cells[0]
    text = "\n".join(f"{row.task}: {cell.text}" for row, cell in zip(entry, cells))
    return Cell(text, "absent" if any(row.absent for row in entry) else "")


def _count(value: Estimate | Absent) -> str:
    return f"{value.n} × {value.seeds}" if isinstance(value, Estimate) else ""


def _knows(who: Attacker) -> str:
    return "" if who == Attacker(who.observer, None, None) else told_knows(who.knows)


def _worst_cells(worst: Worst | Uncrossed | Absent) -> list[Cell | str]:
    if isinstance(worst, Absent):
        return [shown(worst), *[""] * 5]
    if isinstance(worst, Uncrossed):
        counted = f"{worst.counted.passes} of {worst.counted.passes + worst.counted.others}"
        return ["none: nothing crossed", "recorded passes", f"{figure(0.0)}: {counted}", "", "", ""]
    return [worst.by.label, worst.metric, *_controlled_cells(worst.by, worst.metric, joined=True)]


def _controlled_cells(attack: AttackRow, metric: str, *, joined: bool) -> list[Cell | str]:
    found = attack.figures[metric]
    value = [estimated(found.estimate)] if joined else [figure(found.estimate.value), interval(found.estimate)]
    return [*value, _count(found.estimate), figure(found.leaky), figure(found.shuffled)]


def _cost_texts(cost: CostSummary) -> list[str | None]:
    links = "\n".join(f"{link.replace('->', ' → ')} {bytes_text(size)}" for link, size in cost.link_bytes.items())
    crossings = cost.crossings_per_step
    return [
        bytes_text(cost.bytes_per_step),
        links or None,
        seconds_text(cost),
        spread_text(cost.step_ratio, "×") or "not timed together",
        memory_text(cost),
        revealed_text(cost),
        percent(cost.enclave.param_share) or "not counted",
        percent(cost.enclave.flop_share) or "not counted",
        "not counted" if crossings is None else f"{crossings:g}",
    ]


def _attack_lines(row: Row, attack: AttackRow) -> list[list[Cell | str]]:
    what, knows = attack.phase or "no text", told_knows(attack.knows)
    heading: list[Cell | str] = [_name(row), row.task, attack.observer, what, knows, attack.moment]
    heading.append(attack.setting or "defaults")
    if attack.nothing is not None:
        passes = attack.nothing.passes
        return [[*heading, "recorded passes", str(passes), "", "", "", "", status_cell(attack)]]
    if attack.absent is not None:
        return [[*heading, *[""] * 6, status_cell(attack)]]
    return [
        [*heading, metric, *_controlled_cells(attack, metric, joined=False), status_cell(attack)]
        for metric in attack.figures
    ]
