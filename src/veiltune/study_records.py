"""What a comparison leaves: ``results.jsonl``, one record a cell, appended as cells are finished.

A cell is one run (a design with a setting, on a task, with a seed), or one attack on one run's transcript. Whoever makes a
report or gives advice reads these records and nothing else; a cell without a record is missing, not zero.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from veiltune.errors import DataError
from veiltune.results import Record, RunResult
from veiltune.study_terms import Knows, Phase

STUDY_SCHEMA = 1

Metric = Annotated[float, Field(allow_inf_nan=False)]


class AttackFigure(Record):
    """One figure of an attack with its controls; see `veiltune.attacks.controls.Finding`."""

    value: Metric
    n: int = Field(ge=1)
    ci95: tuple[float, float] | None
    leaky_control: Metric
    shuffled_control: Metric


class TextSample(Record):
    """A true text beside what an attack made of it."""

    truth: str
    found: str


class NothingCrossed(Record):
    """Of a phase's texts nothing crossed, counted in the observer's transcript: not a figure of any attack.

    Attributes:
        passes: recorded passes of the phase.
        others: recorded passes, every one of which is of another phase.
        returned: messages with layers that were tuned on the owner's text.
    """

    passes: int = Field(ge=0)
    others: int = Field(ge=0)
    returned: int = Field(default=0, ge=0)


class Cell(Record):
    """What every record says of its cell.

    Attributes:
        schema_version: of this record (``schema`` in JSON).
        cell: digest of everything that the cell's outcome depends on; a finished cell is not measured again.
        design: name in the table of designs.
        setting: the study's label of the design's options.
        model: as configured.
        task: the victim's task, ``commonsenseqa`` for example.
        seed: of the run.
        status: ``ok``; ``failed``: it ended in an error; ``withheld``: an attack whose controls failed, or that had too
            little text.
        error: why, where the status is not ``ok``.
        seconds: the cell took.
        measured_at: ISO date and time, UTC.
    """

    schema_version: Literal[1] = Field(default=STUDY_SCHEMA, alias="schema")
    cell: str
    design: str
    setting: str
    model: str
    task: str
    seed: int
    status: Literal["ok", "failed", "withheld"]
    error: str | None = None
    seconds: float = Field(ge=0)
    measured_at: str


class RunCell(Cell):
    """One run.

    Attributes:
        options: the design's options as configured, flat: ``wire.activation_bits``.
        result: the run's record, where it was finished.
    """

    kind: Literal["run"] = "run"
    options: dict[str, Any] = Field(default_factory=dict)
    result: RunResult | None = None


class AttackCell(Cell):
    """One attack on one run.

    Attributes:
        run: the ``cell`` of the run.
        attack: name in the table of attacks.
        attack_setting: its settings that are not the defaults, as ``key=value, …``.
        moment: the first texts that crossed or the last.
        observer: whose view it read.
        knows: what it takes beyond what the observer has; ``None`` in records of an earlier version, where its name tells.
        phase: whose texts it was after; ``None``: of an earlier version, or no attack on texts.
        nothing: that nothing of the phase crossed, so that there was nothing to attack; then there are no figures.
        figures: by metric; empty where the status is not ``ok``.
        samples: a few texts with what was made of them.
    """

    kind: Literal["attack"] = "attack"
    run: str
    attack: str
    attack_setting: str = ""
    moment: Literal["first", "last"]
    observer: str
    knows: Knows | None = None
    phase: Phase | None = None
    nothing: NothingCrossed | None = None
    figures: dict[str, AttackFigure] = Field(default_factory=dict)
    samples: list[TextSample] = Field(default_factory=list)


StudyRecord = Annotated[RunCell | AttackCell, Field(discriminator="kind")]
_ANY: TypeAdapter[RunCell | AttackCell] = TypeAdapter(StudyRecord)


def read_study(path: Path) -> list[RunCell | AttackCell]:
    """The latest record of every cell, in the order in which cells were first recorded.

    A last line that was cut short (the writer was killed) is left out.

    Raises:
        DataError: no such file, or a line that is no record of this version.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")  # what follows the last line's end was cut short, or is empty
    except OSError as error:
        raise DataError(
            f"cannot read {str(path)!r}: {error.strerror}", hint="give a comparison's results.jsonl"
        ) from None
    latest: dict[str, RunCell | AttackCell] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = _ANY.validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(
                f"{str(path)!r}, line {number}: {where}: {first['msg']}",
                hint="it was altered, or is of another version",
            ) from None
        latest[record.cell] = record  # a cell that failed and was tried again keeps its place
    return list(latest.values())


def append_record(path: Path, record: Cell) -> None:
    """Append one record, with a line's end; what a killed writer left of a line is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = record.model_dump_json(by_alias=True) + "\n"
    with path.open("a+b") as file:
        file.seek(0, os.SEEK_END)
        end = file.tell()
        while end:
            file.seek(end - 1)
            if file.read(1) == b"\n":
                break
            end -= 1
        file.truncate(end)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def runs_of(records: Iterable[RunCell | AttackCell]) -> list[RunCell]:
    """The records of runs."""
    return [record for record in records if isinstance(record, RunCell)]


def attacks_on(run: RunCell, records: Sequence[RunCell | AttackCell]) -> list[AttackCell]:
    """The records of attacks on one run."""
    return [record for record in records if isinstance(record, AttackCell) and record.run == run.cell]
