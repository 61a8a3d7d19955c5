"""Advice for people: what meets the needs, best first, and why the rest does not."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from veiltune.evaluation.advice import Advice, Candidate


def advice_tables(advice: Advice) -> Group:
    """Two tables: the advised with what decided, the refused with every reason."""
    needs = advice.needs
    title = f"{needs.model} on {', '.join(advice.tasks)}; bounds by the {needs.confidence}"
    parts: list[Table | Text] = [Text(title, style="bold")]
    if advice.advised:
        parts.append(_table("meets the needs", advice.advised, f"ranked by: {advice.rule}", ranked=True))
    else:
        parts.append(Text("No recorded design meets these needs.", style="bold red"))
    if advice.refused:
        parts.append(
            _table("does not", advice.refused, "no record: it may be good, but nothing shows it", ranked=False)
        )
    parts.append(Text(f"from {advice.records}; other models, data and settings were not measured", style="dim"))
    return Group(*parts)


def _table(title: str, found: tuple[Candidate, ...], caption: str, *, ranked: bool) -> Table:
    table = Table(title=Text(title), caption=Text(caption), title_style="bold", show_lines=True)
    table.add_column("" if not ranked else "rank", justify="right")
    table.add_column("design")
    table.add_column("because" if ranked else "refused because", ratio=1)
    for number, each in enumerate(found, 1):
        checks = each.checks if ranked else each.refusals
        lines = Text("\n".join([str(check) for check in checks] + [f"note: {note}" for note in each.notes]))
        table.add_row(str(number) if ranked else "", Text(each.label), lines)
    return table
