"""How long the study that comes with the package takes (`veiltune compare small`): seconds a cell, by kind, and in all.

Its cells are those of `benchmarks.attacks`, with the seconds that each took when it was measured; what is missing is
measured first. The report at the end takes seconds and is left out. Quickly: `online` alone, two steps.
"""

from __future__ import annotations

from benchmarks._record import Row, run
from benchmarks._studies import measured, shipped
from veiltune.study_records import AttackCell, RunCell

KINDS: dict[str, type[RunCell | AttackCell]] = {"tuning runs": RunCell, "attacks with their controls": AttackCell}


def measure(quick: bool) -> list[Row]:
    """A row a kind of cell."""
    found = measured("attacks", shipped("small", quick=quick))
    rows: list[Row] = []
    for what, kind in KINDS.items():
        seconds = [record.seconds for record in found.records.values() if isinstance(record, kind)]
        rows.append({"study": found.study.name, "what": what, "cells": len(seconds), "seconds": sum(seconds)})
    return rows


if __name__ == "__main__":
    run("study_time", __doc__, measure)
