"""What the figures mean, what is not protected, what could be done instead, and where the records come from."""

from __future__ import annotations

from collections.abc import Sequence

from veiltune.report.comparison import bytes_text
from veiltune.report.studies.grid import Cell, Grid, shown
from veiltune.report.studies.published import ALTERNATIVES
from veiltune.report.studies.words import cost_text, estimate_cell, hardware_cell
from veiltune.results import RunResult
from veiltune.study_records import AttackCell, RunCell, runs_of
from veiltune.study_rows import CostSummary, Row
from veiltune.study_terms import KNOWS, PHASES, told_knows

MEANINGS: tuple[tuple[str, str], ...] = (
    (
        "utility",
        (
            "The task's metric on held-out items, measured through the protected forward pass after tuning. Of several seeds the "
            "mean; its interval reaches over all of theirs, for they answer the same items."
        ),
    ),
    (
        "difference",
        (
            "To the unprotected run that trains the same layers, or to any unprotected run of the task if there is none; the one "
            "taken is named. Its interval takes the two runs as independent, which is too wide where they answer alike."
        ),
    ),
    (
        "strongest reconstruction",
        (
            "The most text that any attack of one attacker got: ROUGE-L (words in order), else the share of tokens found in "
            "place, else the cosine of states. 1 is the whole text. It bounds from below what can be got: a stronger attack may "
            "come. Chance is above 0 where texts share a template; the shuffled control tells by how much."
        ),
    ),
    (
        "attacker",
        (
            "An observer, the texts it is after, and what it knows beside what it sees and holds. Knowledge: "
            + "; ".join(f"{told_knows(name)}: {text}" for name, text in KNOWS.items())
            + ". Texts: "
            + "; ".join(f"{name}: {text}" for name, text in PHASES.items())
            + ". A figure of privacy against utility is of whoever knows no more than its heading says."
        ),
    ),
    (
        "nothing crossed",
        (
            "Counted in the observer's transcript: every recorded pass was told to be of other texts. Where layers that were "
            "tuned on the text were returned, that is no statement about it, and the cell says so."
        ),
    ),
    (
        "intervals",
        (
            "95%: Wilson's for accuracies, a bootstrap over sequences for attacks. They tell how far another sample of items or "
            "texts would differ, not what another attack would do."
        ),
    ),
    (
        "cost",
        (
            "Bytes are of whole frames, counted where they are sent. Seconds are those of this machine while the parties shared "
            "it; only ratios that were timed in one run carry over to another. Peaks are of resident memory."
        ),
    ),
    (
        "missing, failed, withheld",
        (
            "No record; the cell ended in an error; an attack whose controls failed, so that its figures say nothing. None of "
            "these is a zero."
        ),
    ),
)

LIMITS: tuple[str, ...] = (
    "All parties are taken to follow the protocol and to be curious. Who deviates may learn more.",
    "Lengths of texts, numbers of examples, and times are not hidden from whoever carries or computes on the states.",
    "What the trained adapter or an emulator remembers of the text is not covered by attacks on transcripts.",
    "A simulated enclave protects nothing, whatever the figures of its run are.",
    "Figures hold for this model, these tasks and settings. Others have to be measured.",
)


def alternatives(rows: Sequence[Row]) -> Grid:
    """Unprotected runs of this comparison, then what others published."""
    lines: list[list[Cell | str]] = []
    plain = [row for row in rows if row.design == "local"]
    for row in plain:
        amount = cost_text(row.cost) if isinstance(row.cost, CostSummary) else shown(row.cost).text
        utility = shown(estimate_cell(row.utility)).text
        lines.append(
            [
                f"in the clear ({row.label}, {row.task})",
                f"nothing from the {', '.join(row.facts.clear_to)}",
                f"utility {utility}\n{amount}".strip(),
                hardware_cell(row),
                "measured in this comparison",
            ]
        )
    if not plain:
        lines.append(["in the clear (local)", "nothing", shown(None), "none", "missing: not part of this comparison"])
    lines += [
        [
            each.option,
            each.protects,
            Cell(each.cost, "published"),
            each.hardware,
            Cell(f"published: {each.source}", "published"),
        ]
        for each in ALTERNATIVES
    ]
    return Grid(
        "What could be done instead",
        ("option", "what it protects", "utility and cost", "hardware needed", "where the figure is from"),
        lines,
        "Published figures are of other models, machines and loads: they do not compare with the measured ones by number.",
    )


def unprotected(rows: Sequence[Row]) -> Grid:
    """By design: what it claims to compute, and what its observers see that is no message."""
    from veiltune.designs import DESIGNS

    lines: list[list[Cell | str]] = []
    for name in dict.fromkeys(row.design for row in rows):
        design = DESIGNS.get(name)
        if design is None:
            lines.append([name, *[Cell("not known to this version", "absent")] * 3])
            continue
        clear = [
            f"{who}: {reveal.what}"
            for who, kinds in design.reveals.items()
            if who != "owner" and who not in design.enclaves
            for reveal in kinds.values()
            if reveal.form == "clear"
        ]
        also = [f"{who}: {what}" for who, seen in design.also_sees.items() for what in seen]
        lines.append([name, design.exactness, "\n".join(clear) or "nothing", "\n".join(also) or "nothing"])
    columns = ("design", "what it computes", "messages in the clear, by observer", "what observers see besides")
    return Grid("What each design leaves open", columns, lines)


def provenance(records: Sequence[RunCell | AttackCell]) -> Grid:
    """Versions, machines, data and dates of the runs; each as often as it differs."""
    results = [run.result for run in runs_of(records) if run.result is not None]
    dates = sorted(record.measured_at for record in records)
    seconds = sum(record.seconds for record in records)
    states = [record.status for record in records]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines = [
        ("models", dict.fromkeys(record.model for record in records)),
        ("tasks", dict.fromkeys(record.task for record in records)),
        ("training examples", dict.fromkeys(_examples(result) for result in results)),
        ("versions", dict.fromkeys(_versions(result) for result in results)),
        ("machine", dict.fromkeys(_machine(result) for result in results)),
        ("cells", [f"{len(records)}: {counted or 'none'}; {seconds:.0f} seconds in all"]),
        ("measured", dict.fromkeys([*dates[:1], *dates[-1:]])),
    ]
    rows = [[name, shown("\n".join(values) or None)] for name, values in lines]
    return Grid("Where the figures come from", ("of the records", "value"), rows)


def digests(records: Sequence[RunCell | AttackCell]) -> Grid:
    """Of every run: its cell, and the fingerprint of the configuration that its parties agreed on."""
    lines = [
        [
            f"{run.design}: {run.setting}, {run.task}, seed {run.seed}",
            Cell(run.cell, "code"),
            shown(None if run.result is None else Cell(run.result.fingerprint, "code")),
            run.measured_at,
        ]
        for run in runs_of(records)
    ]
    return Grid("Digests", ("run", "cell", "configuration", "measured"), lines)


def _examples(result: RunResult) -> str:
    data = result.data
    count = "" if data.train_examples is None else f": {data.train_examples:,}"
    return f"{data.train or 'none'}{count}"


def _versions(result: RunResult) -> str:
    return ", ".join(f"{name} {version}" for name, version in result.versions.items())


def _machine(result: RunResult) -> str:
    found = result.machine
    if found is None:
        return "not recorded"
    accelerators = ", ".join(found.accelerators) or "no accelerator"
    return f"{found.platform}, {found.cpu_count} processors, {bytes_text(found.memory_bytes)}, {accelerators}"
