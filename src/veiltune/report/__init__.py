"""Result records for people: terminal tables, Markdown, a plot of losses. Nothing is measured or recomputed here."""

from veiltune.report.comparison import (
    NOTHING,
    SIMULATED,
    SIMULATED_NOTE,
    comparison_markdown,
    comparison_rows,
    comparison_table,
)
from veiltune.report.losses import plot_losses
from veiltune.report.placement import inspect_table
from veiltune.report.study import write_study_report

__all__ = [
    "NOTHING",
    "SIMULATED",
    "SIMULATED_NOTE",
    "comparison_markdown",
    "comparison_rows",
    "comparison_table",
    "inspect_table",
    "plot_losses",
    "write_study_report",
]
