"""Advice from measured records: which designs meet stated needs, in what order, and why each other one does not.

Nothing is advised that was not measured. Where a needed figure is missing, failed or was withheld, the design is refused for
that; it may still be good. What a design's own table decides needs no figure: an observer that gets no message of a kind learns
nothing from it, and one that gets the text as it is has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from veiltune.errors import DataError, UserError, nearest
from veiltune.evaluation.advice_checks import Check, checks_of, enclave_check
from veiltune.evaluation.advice_needs import Needs, ObserverNeeds
from veiltune.evaluation.studies.output import RECORDS
from veiltune.study_records import read_study
from veiltune.study_summary import Absent, Estimate, Row, settings_of, summarise

RULES: Mapping[str, str] = {
    "utility": "least loss against the unprotected baseline on the task where it is largest",
    "privacy": "least text reconstructed by the observer who gets most, on the task where it is most",
    "bytes": "fewest bytes a step",
    "seconds": "fewest seconds a step (median)",
}


@dataclass(frozen=True)
class Candidate:
    """One setting of one design.

    Attributes:
        design: its name.
        setting: the study's label.
        options: of the design, flat.
        checks: every need.
        notes: reservations that are no refusal.
        order: what it is ranked by, smallest first; None where nothing was measured.
    """

    design: str
    setting: str
    options: Mapping[str, Any]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    order: Mapping[str, float | None] = field(repr=False)

    @property
    def label(self) -> str:
        """Design and setting, for people."""
        return self.design if self.setting in {"", self.design} else f"{self.design}: {self.setting}"

    @property
    def refusals(self) -> list[Check]:
        """Needs that are not met, or of which nothing is known."""
        return [check for check in self.checks if not check.is_met]


@dataclass(frozen=True)
class Advice:
    """What the records say to the needs.

    Attributes:
        needs: as stated.
        records: where the figures are from.
        tasks: on which the needs were held against them.
        advised: candidates that meet all of them, best first.
        refused: the others, in the order of the records.
    """

    needs: Needs
    records: Path
    tasks: tuple[str, ...]
    advised: tuple[Candidate, ...]
    refused: tuple[Candidate, ...]

    @property
    def rule(self) -> str:
        """How the advised are ranked, in words."""
        return "; then ".join(RULES[name] for name in self.needs.rank)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""

        def plain(found: Sequence[Candidate]) -> list[dict[str, Any]]:
            return [{**asdict(each), "refusals": [str(check) for check in each.refusals]} for each in found]

        return {
            "model": self.needs.model,
            "tasks": list(self.tasks),
            "confidence": self.needs.confidence,
            "records": str(self.records),
            "ranked_by": self.rule,
            "advised": plain(self.advised),
            "refused": plain(self.refused),
        }


def advise(needs: Needs, records: Path | None = None) -> Advice:
    """Hold needs against a comparison's records.

    Args:
        needs: see `advice_needs`.
        records: ``results.jsonl`` or the directory that has it; default: the needs' own.

    Raises:
        UserError: no records are named, or they hold nothing of the model or a task.
        DataError: they cannot be read.
    """
    path = records or needs.records
    if path is None:
        raise UserError(
            "there are no records to advise from",
            hint="make some with `veiltune compare STUDY`, and give --records DIR or records = 'DIR' in the needs",
        )
    path = path / RECORDS if path.is_dir() else path
    rows = summarise(read_study(path))
    if not rows:
        raise DataError(f"{str(path)!r} holds no record", hint="let `veiltune compare` finish a cell first")
    mine = [row for row in rows if row.model == needs.model]
    if not mine:
        raise UserError(
            f"no record of model {needs.model!r} in {str(path)!r}", hint=nearest(needs.model, {r.model for r in rows})
        )
    recorded = tuple(dict.fromkeys(row.task for row in mine))
    for task in needs.tasks:
        if task not in recorded:
            raise UserError(f"no record of task {task!r} with {needs.model}", hint=nearest(task, recorded))
    tasks = needs.tasks or recorded
    found = [_candidate(needs, [row for row in each if row.task in tasks]) for each in settings_of(mine).values()]
    advised = sorted((each for each in found if not each.refusals), key=partial(_rank, needs))
    return Advice(needs, path, tasks, tuple(advised), tuple(each for each in found if each.refusals))


def _rank(needs: Needs, candidate: Candidate) -> list[tuple[bool, float]]:
    """What was not measured comes last."""
    values = [candidate.order[name] for name in needs.rank]
    return [(value is None, 0.0 if value is None else value) for value in values]


def _candidate(needs: Needs, rows: Sequence[Row]) -> Candidate:
    first = rows[0]
    checks = (
        *(check for row in rows for check in checks_of(needs, row)),
        enclave_check(needs, first),
    )
    notes = dict.fromkeys(note for row in rows for note in _notes(needs, row))
    return Candidate(first.design, first.setting, first.options, checks, tuple(notes), _order(needs, rows))


def _order(needs: Needs, rows: Sequence[Row]) -> dict[str, float | None]:
    """By rule: the worst over tasks, smallest best; None where a task has no figure."""
    costs = [row.cost for row in rows]
    seconds = [
        None if isinstance(c, Absent) or c.seconds_per_step is None else c.seconds_per_step.median for c in costs
    ]
    values: dict[str, list[float | None]] = {
        "utility": [-row.difference.value if isinstance(row.difference, Estimate) else _no_loss(row) for row in rows],
        "privacy": [_exposed(needs, row) for row in rows],
        "bytes": [None if isinstance(cost, Absent) else cost.bytes_per_step for cost in costs],
        "seconds": seconds,
    }
    return {
        name: max((v for v in each if v is not None), default=None) if None not in each else None
        for name, each in values.items()
    }


def _exposed(needs: Needs, row: Row) -> float | None:
    """The most that an observer gets with the knowledge that is assumed of it; None where nothing was measured."""
    found: list[float] = []
    for observer in dict.fromkeys([*row.facts.clear_to, *(who.observer for who in row.worst)]):
        stated = next((each for name, each in needs.observer.items() if name == observer), ObserverNeeds())
        exposure = row.exposure_to(stated.knows, stated.phases, observer)
        found += [] if isinstance(exposure, Absent) else [exposure.estimate.value]
    return max(found, default=None)


def _no_loss(row: Row) -> float | None:
    """The baseline loses nothing against itself."""
    return 0.0 if row.difference is None and isinstance(row.utility, Estimate) else None


def _notes(needs: Needs, row: Row) -> Iterator[str]:
    if row.simulated:
        yield "measured with a SIMULATED enclave, which protects nothing"
    if row.reproducible:
        yield "measured with keys from a seed"
    yield from row.notes
    for observer in needs.observer:
        for attack in row.attacks:
            if attack.observer == observer and attack.absent is not None:
                yield f"{attack.label} ({row.task}) gave no figure: {attack.absent}"
        for who, worst in row.worst.items():
            if who.observer == observer and who.phase and isinstance(worst, Absent) and worst.status == "missing":
                yield f"{who} ({row.task}): {worst}"
