"""What attacks found, for people: metric, value, interval, and the two controls beside it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from veiltune.attacks.controls import Finding
from veiltune.study_terms import told_knows, told_phase


def attack_table(findings: Sequence[Finding]) -> Table:
    """Findings of one attack, one row a metric; none of one where nothing crossed."""
    if not findings:
        return Table(title=Text("nothing crossed of these texts: there is nothing to attack"), title_style="bold")
    first = findings[0]
    setting = f" ({first.setting})" if first.setting else ""
    texts = f", of {told_phase(first.phase)}" if first.phase else ""
    table = Table(
        title=Text(f"{first.attack}{setting} on {first.design}, as the {first.observer} saw it{texts}"),
        caption=Text(f"knows besides: {told_knows(first.knows)}; leaky: protection off; shuffled: against other texts"),
        title_style="bold",
    )
    for name in ("metric", "value", "95% interval", "n", "leaky", "shuffled"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for each in findings:
        interval = "-" if each.ci95 is None else f"{each.ci95[0]:.3f} to {each.ci95[1]:.3f}"
        cells = (
            f"{each.value:.3f}",
            interval,
            str(each.n),
            f"{each.leaky_control:.3f}",
            f"{each.shuffled_control:.3f}",
        )
        table.add_row(each.metric, *cells)
    return table
