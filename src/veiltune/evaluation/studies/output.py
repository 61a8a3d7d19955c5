"""A comparison's directory: whose it is, which records belong to the study as it is now, and one writer at a time.

::

    OUT/study.json       what is planned: {"schema": 1, "kind": "study", "name", "title", "planned": [{a cell's heading}, …]}
    OUT/results.jsonl    the records of the study's cells
    OUT/earlier.jsonl    records of cells that it no longer has; they come back if it has them again
    OUT/runs/NAME/       one run: adapter, log, result.json
    OUT/log/CELL.txt     where an attack broke, for whoever mends it
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veiltune.errors import ConfigError
from veiltune.evaluation.studies.plan import Study
from veiltune.results import write_json, write_text
from veiltune.study_records import STUDY_SCHEMA, AttackCell, RunCell, read_study

PLANNED, RECORDS, EARLIER = "study.json", "results.jsonl", "earlier.jsonl"
_LOCK = ".lock"
_OURS = (RECORDS, EARLIER, "runs", "log", PLANNED)  # the last to go says whose the directory is


@contextmanager
def open_output(directory: Path, study: Study, *, overwrite: bool) -> Generator[None]:
    """Make a comparison's directory ready, and keep others out of it.

    Raises:
        ConfigError: it holds something else, or another comparison is at work in it.
        DataError: its records were altered, or are of another version.
    """
    from filelock import FileLock, Timeout

    others = {path.name for path in directory.iterdir()} - {_LOCK} if directory.is_dir() else set()
    if directory.exists() and PLANNED not in others and (others or not directory.is_dir()):
        raise ConfigError(
            f"{str(directory)!r} holds something other than a comparison", hint="choose another --output directory"
        )
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another comparison is at work in {str(directory)!r}", hint="wait for it, or choose another --output"
        ) from None
    try:
        if overwrite:
            _clear(directory)
        _sort_records(directory, study)
        write_json(directory / PLANNED, _planned(study))
        yield
    finally:
        lock.release()


def _clear(directory: Path) -> None:
    for name in _OURS:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sort_records(directory: Path, study: Study) -> None:
    """Put aside the records of cells that the study does not have, and take back those that it has again."""
    records, earlier = directory / RECORDS, directory / EARLIER
    now = read_study(records) if records.is_file() else []
    before = read_study(earlier) if earlier.is_file() else []
    latest = {record.cell: record for record in [*before, *now]}
    cells = set(study.cells)
    wanted = [record for cell, record in latest.items() if cell in cells]
    if {record.cell for record in now} == {record.cell for record in wanted}:
        return
    known = {record.cell for record in before}
    write_text(earlier, _lines(record for cell, record in latest.items() if cell not in cells or cell in known))
    write_text(records, _lines(wanted))


def _lines(records: Iterable[RunCell | AttackCell]) -> str:
    return "".join(record.model_dump_json(by_alias=True) + "\n" for record in records)


def _planned(study: Study) -> dict[str, Any]:
    cells: list[dict[str, Any]] = []
    for run in study.runs:
        heading = {"design": run.config.design, "setting": run.setting, "model": run.config.model, "task": run.task}
        heading |= {"seed": run.config.seed}
        cells.append({"kind": "run", "cell": run.cell, **heading})
        cells += [
            {
                "kind": "attack",
                "cell": each.cell,
                "run": run.cell,
                **heading,
                "attack": each.attack.name,
                "attack_setting": each.attack.setting,
                "phase": each.phase,
                "moment": each.moment,
                "observer": each.attack.observer,
            }
            for each in run.attacks
        ]
    return {"schema": STUDY_SCHEMA, "kind": "study", "name": study.name, "title": study.title, "planned": cells}
