"""Benchmarks that are studies (`veiltune compare`): their cells are measured once, their records become rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks._cells import CELLS
from benchmarks._record import Row
from veiltune.evaluation.studies import RECORDS, StudyFile, open_output, plan_study, read_study_file, run_study
from veiltune.report import write_study_report
from veiltune.study_records import AttackCell, RunCell, read_study

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


def measured(name: str, file: StudyFile) -> Path:
    """The records of a study for benchmark ``name``, once whatever cells were missing are measured.

    They lie under ``benchmarks/.cells/NAME``, with the comparison's own report.
    """
    study = plan_study(file)
    directory = CELLS / name / study.name
    with open_output(directory, study, overwrite=False):
        run_study(study, directory)
        write_study_report(read_study(directory / RECORDS), directory, title=study.title)
    return directory / RECORDS


def attack_rows(records: Path) -> list[Row]:
    """A row a figure, in the study's order; one that says why for an attack without figures."""
    rows: list[Row] = []
    for record in read_study(records):
        if not isinstance(record, AttackCell):
            continue
        setting = "; ".join(part for part in (record.setting, record.attack_setting, f"{record.moment} texts") if part)
        heading = {name: getattr(record, name) for name in ("attack", "observer", "design", "model", "task")}
        heading |= {"setting": setting, "measured_at": record.measured_at[:10]}
        heading |= {name: value for name in ("knows", "phase") if (value := getattr(record, name)) is not None}
        if record.nothing is not None:
            rows.append({**heading, "nothing": record.nothing.model_dump()})
        if record.status != "ok":
            rows.append({**heading, record.status: record.error})
        rows += [{**heading, "metric": name, **figure.model_dump()} for name, figure in record.figures.items()]
    return rows


def run_rows(records: Path) -> list[Row]:
    """A row a run and metric of its task: accuracy, and the bytes of a training step."""
    rows: list[Row] = []
    for record in read_study(records):
        if not isinstance(record, RunCell):
            continue
        heading = {name: getattr(record, name) for name in ("design", "setting", "model", "task")}
        heading["measured_at"] = record.measured_at[:10]
        if record.result is None:
            rows.append({**heading, record.status: record.error})
            continue
        heading["bytes_per_step"] = record.result.cost.bytes_per_step
        rows += [
            {**heading, "metric": name.rpartition("/")[2], **figure.model_dump()}
            for name, figure in record.result.utility.items()
        ]
    return rows
