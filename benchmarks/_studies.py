"""Benchmarks that are studies (`veiltune compare`): their cells are measured once, their records become rows.

Stopped with Ctrl-C, such a benchmark writes what was measured until then; a cell that was not has a row that says so. The next
call measures the rest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
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


def shipped(name: str, *, quick: bool) -> StudyFile:
    """A study that comes with the package; quickly: `online` alone, one value of what is swept, two steps and four items."""
    file = read_study_file(name)
    if not quick:
        return file
    tables = file.tables.model_copy(update=FEW)
    one = [each for each in file.designs if each.design == "online"]
    return StudyFile(
        name=f"{file.name}-quick",
        tables=tables,
        tasks=file.tasks,
        attacks={name: each.model_copy(update={"limit": 2}) for name, each in file.attacks.items()},
        designs=tuple(
            each.model_copy(update={"sweep": {key: values[-1:] for key, values in each.sweep.items()}}) for each in one
        ),
    )


@dataclass(frozen=True)
class Measured:
    """A study, and the records of its cells by their digests; one that was not measured has none."""

    study: Study
    records: dict[str, RunCell | AttackCell]


def measured(name: str, file: StudyFile) -> Measured:
    """A study for benchmark ``name``, once whatever cells were missing are measured.

    They lie under ``benchmarks/.cells/NAME``, with the comparison's own report.
    """
    study = plan_study(file)
    directory = CELLS / name / study.name
    with open_output(directory, study, overwrite=False):
        with suppress(KeyboardInterrupt):  # what was recorded stays, and is what there is to write
            run_study(study, directory, on_event=_say)
        records = read_study(directory / RECORDS)
        write_study_report(records, directory, title=study.title)
    return Measured(study, {record.cell: record for record in records})


def _say(event: str, fields: dict[str, Any]) -> None:
    """A line on stderr for each cell that ended."""
    if event == "cell_ended":
        told = f"{time.strftime('%H:%M:%S')} {fields['title']}: {fields['status']}, {fields['seconds']:.0f} s"
        _console.print(told, highlight=False, markup=False, soft_wrap=True)


def attack_rows(found: Measured) -> list[Row]:
    """A row a figure, in the study's order; one that says why for an attack without figures."""
    return [row for run in found.study.runs for plan in run.attacks for row in _rows(run, plan, found.records)]


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


def run_rows(found: Measured) -> list[Row]:
    """A row a run and metric of its task: accuracy, the bytes of a training step, and the share of the model at the owner."""
    rows: list[Row] = []
    for plan in found.study.runs:
        record = found.records.get(plan.cell)
        heading: Row = {
            "design": plan.config.design,
            "setting": plan.setting,
            "model": plan.config.model,
            "task": plan.task,
            "seed": plan.config.seed,
        }
        if not isinstance(record, RunCell):
            rows.append({**heading, "missing": "not measured"})
            continue
        heading["measured_at"] = record.measured_at[:10]
        if record.result is None:
            rows.append({**heading, record.status: record.error})
            continue
        cost = record.result.cost
        heading |= {"bytes_per_step": cost.bytes_per_step, "owner_share": cost.revealed_param_share.get("owner")}
        rows += [
            {**heading, "metric": name.rpartition("/")[2], **figure.model_dump()}
            for name, figure in record.result.utility.items()
        ]
    return rows
