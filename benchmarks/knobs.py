"""Which way privacy and accuracy move with one knob at a time: α, bits and κ of SmolLM2-135M's runs on CommonsenseQA.

The study `sweeps` (`veiltune compare sweeps`) with the entries of these three knobs alone, and of its attacks those that do not
know the weights' ancestors, after the texts that were tuned on. Cells are kept under ``benchmarks/.cells/knobs``. A row is one
attack at one value of a knob, with the accuracy of the same setting.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks._record import Row, run
from benchmarks._studies import FEW, Measured, attack_rows, measured
from veiltune.evaluation.studies import StudyFile, read_study_file
from veiltune.evaluation.studies.grammar import DesignEntry
from veiltune.results import Measurement
from veiltune.study_records import runs_of

STUDY = "sweeps"
KNOBS = {
    "online.decorrelation.alpha": "alpha",
    "online.wire.activation_bits": "bits",
    "obfuscatune.condition_number": "kappa",
}
"""What is swept, and what it is called in a row."""
ATTACKS = ("ridge", "matching", "anchors", "plaintext")
ITEMS = 100


def _knob(entry: DesignEntry) -> str | None:
    return next((KNOBS[key] for key in entry.sweep if key in KNOBS), None)


def _narrowed(file: StudyFile, *, quick: bool) -> StudyFile:
    """Entries of the knobs, and the attacks that are made here; quickly: the ends of the first knob."""
    tables = file.tables.model_copy(update=FEW if quick else {"evaluate": {**file.tables.evaluate, "limit": ITEMS}})
    attacks = {
        name: file.attacks[name].model_copy(update={"phases": ("tuning",), **({"limit": 2} if quick else {})})
        for name in ATTACKS[: 1 if quick else None]
    }
    designs = [entry for entry in file.designs if _knob(entry) is not None]
    if quick:
        designs = [designs[0].model_copy(update={"sweep": {key: (v[0], v[-1]) for key, v in designs[0].sweep.items()}})]
    name = f"{file.name}-quick" if quick else file.name
    return StudyFile(name=name, tables=tables, tasks=file.tasks, attacks=attacks, designs=tuple(designs))


def _rows(found: Measured) -> list[Row]:
    """Attack rows, each with the accuracy of its run and the values of what is swept."""
    runs = {(each.design, each.setting): each for each in runs_of(found.records.values())}
    rows: list[Row] = []
    for row in attack_rows(found):
        made = runs.get((row["design"], row["setting"].partition(";")[0]))
        if made is None:
            rows.append(row)
            continue
        swept = {name: made.options.get(key.partition(".")[2]) for key, name in KNOBS.items()}
        utility: Mapping[str, Measurement] = {} if made.result is None else made.result.utility
        own = (each.model_dump() for name, each in utility.items() if name.startswith(f"{row['task']}/"))
        rows.append(
            {**row, **{name: value for name, value in swept.items() if value is not None}, "accuracy": next(own, None)}
        )
    return rows


def measure(quick: bool) -> list[Row]:
    """Whatever cells are not measured yet, and the rows of all."""
    return _rows(measured("knobs", _narrowed(read_study_file(STUDY), quick=quick)))


if __name__ == "__main__":
    run("knobs", __doc__, measure)
