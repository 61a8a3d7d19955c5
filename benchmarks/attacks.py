"""What attacks get out of recorded runs of SmolLM2-135M: every design, first and last texts, with both controls.

The runs and attacks are those of the study `small` (`veiltune compare small`), and so are the cells: what was measured is kept
under ``benchmarks/.cells/attacks``, where the comparison's own report lies too. The victim's text is commonsenseqa, the
attacker's public text BoolQ. What was tuned on comes first, then the questions that accuracy was measured on; where no pass of
a phase crossed, a row says so. Known plaintext and Gram anchors know the tokens of some of the victim's own texts; those are
not scored. The public ancestor is the model itself with Gaussian noise of the stated relative size. Quickly: `online` alone,
two steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks._cells import CELLS
from benchmarks._record import Row, run
from veiltune.evaluation.studies import RECORDS, StudyFile, open_output, plan_study, read_study_file, run_study
from veiltune.report import write_study_report
from veiltune.study_records import AttackCell, read_study

STUDY = "small"
FEW: dict[str, Any] = {"train": {"steps": 2, "batch_size": 4}, "evaluate": {"limit": 4}}


def _quickly(file: StudyFile) -> StudyFile:
    """One design, two steps and four items of it."""
    tables = file.tables.model_copy(update=FEW)
    return StudyFile(
        name=f"{file.name}-quick",
        tables=tables,
        tasks=file.tasks,
        attacks={name: each.model_copy(update={"limit": 2}) for name, each in file.attacks.items()},
        designs=tuple(each for each in file.designs if each.design == "online"),
    )


def rows_of(records: Path) -> list[Row]:
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


def measure(quick: bool) -> list[Row]:
    """Whatever cells of the study are not measured yet, and the rows of all its attacks."""
    file = read_study_file(STUDY)
    study = plan_study(_quickly(file) if quick else file)
    directory = CELLS / "attacks" / study.name
    with open_output(directory, study, overwrite=False):
        run_study(study, directory)
        write_study_report(read_study(directory / RECORDS), directory, title=study.title)
    return rows_of(directory / RECORDS)


if __name__ == "__main__":
    run("attacks", __doc__, measure)
