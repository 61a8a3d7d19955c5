"""The report of a comparison: a page, figures and tables from its records, and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from veiltune.errors import UserError
from veiltune.report.comparison import SIMULATED_NOTE
from veiltune.report.figures import svg, write_png
from veiltune.report.studies import notes, pareto, sweeps, tables
from veiltune.report.studies.grid import Grid, to_markdown
from veiltune.report.studies.page import Page
from veiltune.results import write_text
from veiltune.study_records import AttackCell, RunCell
from veiltune.study_rows import Row
from veiltune.study_summary import summarise

PAGE, FRONT, TABLES = "report.html", "pareto.png", "tables.md"
_WHITE = "#ffffff"
_NARROW = 5.2
"""Inches of a figure in the page: not much wider than a telephone, or its words could not be read there."""


def write_study_report(records: Sequence[RunCell | AttackCell], directory: Path, *, title: str) -> list[Path]:
    """Write ``report.html``, ``pareto.png``, one ``sweep-DESIGN-OPTION.png`` for each sweep found, and ``tables.md``.

    The page is self-contained. It holds samples of the attacked texts; ``tables.md`` and the pictures hold none.

    Args:
        records: of `veiltune.study_records.read_study`.
        directory: made if need be.
        title: of the page.

    Returns:
        The files written, the page first.

    Raises:
        UserError: there are no records.
    """
    if not records:
        raise UserError("there are no records to report", hint="give the results.jsonl of a comparison that has begun")
    rows = summarise(records)
    found = sweeps.find_sweeps(rows)
    write_text(directory / PAGE, study_page(records, rows, found, title))
    write_png(pareto.draw(_panels(rows), paper=_WHITE), directory / FRONT)
    written = [directory / PAGE, directory / FRONT]
    for path, sweep in zip(_sweep_paths(directory, found), found, strict=True):
        write_png(sweeps.draw(sweep, paper=_WHITE), path)
        written.append(path)
    write_text(directory / TABLES, study_markdown(records, rows, title))
    return [*written, directory / TABLES]


def study_page(
    records: Sequence[RunCell | AttackCell], rows: Sequence[Row], found: Sequence[sweeps.Sweep], title: str
) -> str:
    """The page.

    Args:
        records: of the comparison; for what the figures come from.
        rows: `summarise` of them.
        found: `find_sweeps` of those.
        title: of the page.
    """
    page = Page(title, _lead(rows), _warnings(rows))
    page.section("At a glance")
    for grid in _for_models(rows, tables.glance):
        page.table(grid)
    _front_section(page, rows)
    _sweep_section(page, found)
    page.section("Utility, privacy and cost, row by row")
    for make in (tables.utilities, tables.privacy, tables.costs):
        for grid in _for_models(rows, make):
            page.table(grid)
    page.section("Every attack", "All figures of each attack, with controls.")
    for model in _models(rows):
        for name, grid in tables.attack_tables(model, _of(model, rows)).items():
            page.table(grid, folded=f"{name} ({model})")
    _sample_section(page, rows)
    page.section("What you could do instead")
    page.table(notes.alternatives(rows))
    page.section("What the figures mean")
    page.meanings(notes.MEANINGS)
    page.section("What is not protected")
    page.points(notes.LIMITS)
    page.table(notes.unprotected(rows))
    page.section("Where the figures come from")
    page.table(notes.provenance(records))
    for grid in _for_models(rows, tables.options):
        page.table(grid)
    page.table(notes.digests(records), folded="digests of configurations")
    return page.html()


def study_markdown(records: Sequence[RunCell | AttackCell], rows: Sequence[Row], title: str) -> str:
    """Every table as Markdown. Samples of texts are left out: whoever quotes tables seldom means to quote secrets."""
    grids = [
        *(
            grid
            for make in (tables.glance, tables.utilities, tables.privacy, tables.costs)
            for grid in _for_models(rows, make)
        ),
        *(grid for model in _models(rows) for grid in tables.attack_tables(model, _of(model, rows)).values()),
        notes.alternatives(rows),
        *_for_models(rows, tables.options),
        notes.provenance(records),
        notes.digests(records),
    ]
    warnings = [f"**{text}**\n" for text in _warnings(rows)]
    return "\n".join([f"# {title}\n", f"{_lead(rows)}\n", *warnings, *map(to_markdown, grids)])


# --- parts ------------------------------------------------------------------------------------------------------------


def _models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.model for row in rows))


def _of(model: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.model == model]


def _for_models(rows: Sequence[Row], make: tables.Maker) -> list[Grid]:
    return [make(model, _of(model, rows)) for model in _models(rows)]


def _panels(rows: Sequence[Row]) -> list[pareto.Panel]:
    """Those of each task of each model."""
    several = len(_models(rows)) > 1
    named = {
        (model, task): f"{model}, {task}" if several else task
        for model, task in dict.fromkeys((row.model, row.task) for row in rows)
    }
    return [
        panel
        for key, name in named.items()
        for panel in pareto.panels_of(name, [row for row in rows if (row.model, row.task) == key])
    ]


def _lead(rows: Sequence[Row]) -> str:
    designs = len({row.design for row in rows})
    settings = len({(row.model, row.design, row.setting) for row in rows})
    tasks = len({row.task for row in rows})
    measured = sum(row.absent is None for row in rows)
    return (
        f"{designs} designs in {settings} settings on {tasks} tasks: {measured} of {len(rows)} were measured. "
        f"Models: {', '.join(_models(rows))}. Every figure is from a run of this comparison unless it is marked as published."
    )


def _warnings(rows: Sequence[Row]) -> list[str]:
    simulated = dict.fromkeys(row.label for row in rows if row.simulated)
    seeded = dict.fromkeys(row.label for row in rows if row.reproducible)
    found = [f"{', '.join(simulated)}: {SIMULATED_NOTE}"] if simulated else []
    if seeded:
        found.append(f"{', '.join(seeded)}: keys were REPRODUCIBLE from a seed; whoever has the seed has the keys.")
    return found


def _front_section(page: Page, rows: Sequence[Row]) -> None:
    page.section(
        "Privacy against utility",
        "Up is more useful, right is more private; a larger marker moves more bytes a step. Bars are 95% intervals. The dashed "
        "line joins the settings that no other beats in both; where intervals overlap, the order may be chance. Each figure is "
        "of attackers who are after the same texts and know no more than its heading says.",
    )
    drawn = []
    for number, panel in enumerate(_panels(rows), 1):
        title, words = panel.title, pareto.described(panel)
        picture = svg(pareto.draw([panel], width=_NARROW), label=f"{title}: {words}", prefix=f"front{number}")
        drawn.append((picture, title, words))
    page.figures(drawn)


def _sweep_section(page: Page, found: Sequence[sweeps.Sweep]) -> None:
    page.section("One option at a time", "" if found else "No two settings of a design differ in exactly one option.")
    if not found:
        return
    drawn = []
    for number, sweep in enumerate(found, 1):
        line, words = f"{sweep.title} ({sweep.model})", sweeps.described(sweep)
        drawn.append(
            (svg(sweeps.draw(sweep, width=_NARROW), label=f"{line}. {words}", prefix=f"sweep{number}"), line, words)
        )
    page.figures(drawn, small=True)


def _sample_section(page: Page, rows: Sequence[Row]) -> None:
    shown = [(row, attack) for row in rows for attack in row.attacks if attack.samples]
    page.section(
        "Original beside reconstructed text",
        "Secret material of the experiment: these are the attacked texts themselves. Do not pass this page on where they "
        "must not go."
        if shown
        else "No attack left a sample.",
    )
    for row, attack in shown:
        page.samples(row, attack)


def _sweep_paths(directory: Path, found: Sequence[sweeps.Sweep]) -> list[Path]:
    """A name for each sweep's picture; of several models a number tells them apart."""
    names = [sweep.file_name for sweep in found]
    return [
        directory / f"{name}{f'-{names[: at + 1].count(name)}' if name in names[:at] else ''}.png"
        for at, name in enumerate(names)
    ]
