"""What a defence at the cut is worth: accuracy and bytes beside what the strongest attack finds, with it and without.

The runs and attacks are those of two studies of SmolLM2-135M (`veiltune compare`). `positions`: `online` with six blocks below
and six above the trunk, sending every position, or of each row its first and its last 16, 8 or 2. `deep`: `online`, `offline`
and `gradfree` with a trunk of six blocks, every position or the first and the last few, and what the owner's layers reach
without the trunk. The attack is the learned inverter, which knows the defence: it learns with the same positions left out and
guesses every token. Accuracies of `online` and `offline` in `deep` are measured on its first task with another seed as well,
nothing being attacked. Quickly: one number of positions of `online`, two steps.
"""

from __future__ import annotations

import dataclasses

from benchmarks._record import Row, run
from benchmarks._studies import attack_rows, measured, run_rows, shipped
from veiltune.evaluation.studies import StudyFile

STUDIES = ("deep", "positions")
AGAIN = "deep, another seed"
"""Of rows without attacks: what is compared in `deep`, measured again."""
SEEDS = (1,)
COMPARED = ("online", "offline")
"""What is: the designs whose trunk carries the task there."""


def _again(file: StudyFile) -> StudyFile:
    """Few positions and all of the designs in `COMPARED`, on the first task; nothing is attacked."""
    tables = file.tables.model_copy(update={"seeds": SEEDS})
    designs = tuple(each.model_copy(update={"attacks": ()}) for each in file.designs if each.design in COMPARED)
    return dataclasses.replace(file, name=f"{file.name}-seeds", tables=tables, tasks=file.tasks[:1], designs=designs)


def measure(quick: bool) -> list[Row]:
    """Whatever cells of the studies are not measured yet; of each the rows of runs, then of attacks; then another seed."""
    rows: list[Row] = []
    for name in STUDIES:
        found = measured("defences", shipped(name, quick=quick))
        rows += [{"study": name, **row} for row in [*run_rows(found), *attack_rows(found)]]
    again = _again(shipped(STUDIES[0], quick=quick))
    return [*rows, *({"study": AGAIN, **row} for row in run_rows(measured("defences", again)))]


if __name__ == "__main__":
    run("defences", __doc__, measure)
