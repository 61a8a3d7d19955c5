"""A table before it is drawn, and its two forms: HTML for the report, Markdown for whoever quotes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from veiltune.report.comparison import markdown_row
from veiltune.study_values import Absent

Kind = Literal["", "absent", "loud", "published", "code"]
"""``absent``: no figure, and why; ``loud``: a reservation; ``published``: others' figure; ``code``: a digest or a name."""

UNBROKEN = 30
"""Characters of a line that stays one."""


@dataclass(frozen=True)
class Cell:
    """One cell. Lines of its text are kept apart."""

    text: str
    kind: Kind = ""


@dataclass(frozen=True)
class Grid:
    """A table: what it shows, its columns, its rows (the first cell of each names it), and a note below."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    note: str = ""


def shown(value: Cell | Absent | str | None) -> Cell:
    """A cell of a value: an absent one says why, one that nobody recorded is missing."""
    if value is None:
        return Cell("missing", "absent")
    if isinstance(value, Absent):
        return Cell(str(value), "absent")
    return Cell(value) if isinstance(value, str) else value


def to_html(grid: Grid, identifier: str) -> str:
    """A real table in a region of its own, which scrolls sideways where the page is narrow."""
    caption = f'<caption id="{identifier}"><span>{escape(grid.caption)}</span></caption>'
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in grid.columns)
    body = "".join(_html_row(row) for row in grid.rows)
    note = f'<p class="note">{escape(grid.note)}</p>' if grid.note else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{identifier}"><table>{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"
    )


def _html_row(row: Sequence[Cell | str]) -> str:
    first, *others = (shown(cell) for cell in row)
    return f'<tr><th scope="row">{_html_text(first)}</th>{"".join(_html_cell(cell) for cell in others)}</tr>'


def _html_cell(cell: Cell) -> str:
    return f'<td class="{cell.kind}">{_html_text(cell)}</td>' if cell.kind else f"<td>{_html_text(cell)}</td>"


def _html_text(cell: Cell) -> str:
    if cell.kind == "code":
        return "<br>".join(f"<code>{escape(line)}</code>" for line in cell.text.splitlines())
    if cell.kind:
        return "<br>".join(escape(line) for line in cell.text.splitlines())
    return "".join(_html_line(line) for line in cell.text.splitlines())


def _html_line(line: str) -> str:
    """A line; a short one, such as a figure with its interval, is not broken, and one that ends with a colon heads the next."""
    kinds = ["line", *(["short"] if len(line) <= UNBROKEN else []), *(["heads"] if line.endswith(":") else [])]
    return f'<span class="{" ".join(kinds)}">{escape(line)}</span>'


def to_markdown(grid: Grid) -> str:
    """A Markdown table under its caption; the lines of a cell are parted by semicolons."""
    lines = [f"**{grid.caption}**", "", markdown_row(grid.columns), "|---" * len(grid.columns) + "|"]
    lines += [markdown_row("; ".join(shown(cell).text.splitlines()) for cell in row) for row in grid.rows]
    return "\n".join([*lines, *(["", grid.note] if grid.note else [])]) + "\n"
