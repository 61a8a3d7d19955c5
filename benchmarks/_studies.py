"""Benchmarks that are a shipped study: its cells are kept, and a row is made of every figure.

Stopped with Ctrl-C, such a benchmark writes what was measured until then; a cell that was not has a row that says so. The next
call measures the rest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from rich.console import Console

from benchmarks._cells import CELLS
from benchmarks._record import Row
from veiltune.evaluation.studies import (
    RECORDS,
    AttackPlan,
    RunPlan,
    Study,
    StudyFile,
    open_output,
    plan_study,
    read_study_file,
    run_study,
)
from veiltune.report import write_study_report
from veiltune.study_records import AttackCell, RunCell, read_study

_console = Console(stderr=True)
FEW: dict[str, Any] = {"train": {"steps": 2, "batch_size": 4}, "evaluate": {"limit": 4}}


def measured(name: str, benchmark: str, *, quick: bool) -> list[Row]:
    """Whatever cells of a study are not measured yet, and the rows of all its attacks.

    Args:
        name: of the study.
        benchmark: whose cells they are, under ``benchmarks/.cells``.
        quick: `online` alone, two steps and four items of it.
    """
    file = read_study_file(name)
    study = plan_study(_quickly(file) if quick else file)
    directory = CELLS / benchmark / study.name
    with open_output(directory, study, overwrite=False):
        with suppress(KeyboardInterrupt):  # what was recorded stays, and is what there is to write
            run_study(study, directory, on_event=_say)
        records = read_study(directory / RECORDS)
        write_study_report(records, directory, title=study.title)
    return rows_of(study, {record.cell: record for record in records})


def _say(event: str, fields: dict[str, Any]) -> None:
    """A line on stderr for each cell that ended."""
    if event == "cell_ended":
        told = f"{time.strftime('%H:%M:%S')} {fields['title']}: {fields['status']}, {fields['seconds']:.0f} s"
        _console.print(told, highlight=False, markup=False, soft_wrap=True)


def _quickly(file: StudyFile) -> StudyFile:
    return StudyFile(
        name=f"{file.name}-quick",
        tables=file.tables.model_copy(update=FEW),
        tasks=file.tasks,
        attacks={name: each.model_copy(update={"limit": 2}) for name, each in file.attacks.items()},
        designs=tuple(each for each in file.designs if each.design == "online"),
    )


def rows_of(study: Study, records: dict[str, RunCell | AttackCell]) -> list[Row]:
    """A row a figure, in the study's order; one that says why for an attack without figures."""
    return [row for run in study.runs for plan in run.attacks for row in _rows(run, plan, records)]


def _rows(run: RunPlan, plan: AttackPlan, records: dict[str, RunCell | AttackCell]) -> Iterator[Row]:
    record, of_run = records.get(plan.cell), records.get(run.cell)
    attack = plan.attack
    row: Row = {"attack": attack.name, "observer": attack.observer, "design": run.config.design}
    row |= {"model": run.config.model, "task": run.task}
    row["setting"] = "; ".join(part for part in (run.setting, attack.setting, f"{plan.moment} texts") if part)
    told = {"measured_at": record.measured_at[:10]} if record else {}
    told |= {"knows": attack.knows} | ({"phase": plan.phase} if plan.phase else {})
    row |= told
    if not isinstance(record, AttackCell):
        yield {**row, "missing": f"its run failed: {of_run.error}" if of_run and of_run.error else "not measured"}
        return
    if record.nothing is not None:
        yield {**row, "nothing": record.nothing.model_dump()}
    if record.status != "ok":
        yield {**row, record.status: record.error}
    yield from ({**row, "metric": name, **figure.model_dump()} for name, figure in record.figures.items())
