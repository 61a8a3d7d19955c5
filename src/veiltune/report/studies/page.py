"""The report as one page: sections of tables, figures and texts in a template that needs nothing from outside itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from string import Template

from veiltune.report.studies.grid import Grid, to_html
from veiltune.report.studies.words import figure
from veiltune.study_rows import AttackRow, Row

SAMPLES = 2
"""Texts shown of one attack on one row."""


@dataclass
class Page:
    """A page that grows section by section.

    Attributes:
        title: of the page.
        lead: one paragraph below it.
        warnings: what must be read first.
    """

    title: str
    lead: str
    warnings: Sequence[str] = ()
    _sections: list[tuple[str, list[str]]] = field(default_factory=list)
    _tables: int = 0

    def section(self, title: str, text: str = "") -> None:
        """Begin a section."""
        self._sections.append((title, [f"<p>{escape(text)}</p>"] if text else []))

    def heading(self, text: str) -> None:
        """A heading within the section."""
        self._add(f"<h3>{escape(text)}</h3>")

    def table(self, grid: Grid, *, folded: str = "") -> None:
        """A table; with ``folded`` behind a line of that text that opens it."""
        self._tables += 1
        html = to_html(grid, f"table-{self._tables}")
        self._add(f"<details><summary>{escape(folded)}</summary>{html}</details>" if folded else html)

    def figures(self, drawn: Sequence[tuple[str, str, str]], *, small: bool = False) -> None:
        """Inline pictures, each with a line below it, and what it shows in words behind that."""
        parts = [
            f'<figure><div class="plot" tabindex="0" role="group" aria-label="{escape(line)}">{picture}</div>'
            f"<figcaption>{escape(line)}<details><summary>in words</summary>{escape(words)}</details></figcaption></figure>"
            for picture, line, words in drawn
        ]
        self._add(f'<div class="figures{" small" if small else ""}">{"".join(parts)}</div>')

    def meanings(self, terms: Sequence[tuple[str, str]]) -> None:
        """Words and what they mean."""
        body = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in terms)
        self._add(f'<dl class="meanings">{body}</dl>')

    def points(self, texts: Sequence[str]) -> None:
        """A list."""
        self._add(f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>")

    def samples(self, row: Row, attack: AttackRow) -> None:
        """True texts beside what an attack made of them."""
        metric = attack.text_metric
        strength = "" if metric is None else f", {metric} {figure(attack.figures[metric].estimate.value)}"
        pairs = "".join(
            f'<dl class="pair"><div><dt>original</dt><dd>{escape(each.truth)}</dd></div>'
            f"<div><dt>reconstructed</dt><dd>{escape(each.found)}</dd></div></dl>"
            for each in attack.samples[:SAMPLES]
        )
        title = f"{row.label}, {row.task}: {attack.label} by {attack.attacker}{strength}"
        self._add(f'<div class="secret"><h3>{escape(title)}</h3>{pairs}</div>')

    def html(self) -> str:
        """The whole page."""
        names = [f"section-{number}" for number in range(1, len(self._sections) + 1)]
        parts: Mapping[str, str] = {
            "title": escape(self.title),
            "lead": escape(self.lead),
            "warnings": "".join(f'<p class="warning">{escape(text)}</p>' for text in self.warnings),
            "contents": "".join(
                f'<li><a href="#{name}">{escape(title)}</a></li>' for name, (title, _) in zip(names, self._sections)
            ),
            "sections": "\n".join(
                f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{"".join(body)}</section>'
                for name, (title, body) in zip(names, self._sections)
            ),
        }
        template = files("veiltune.report.studies").joinpath("page.html").read_text(encoding="utf-8")
        return Template(template).substitute(parts)

    def _add(self, html: str) -> None:
        self._sections[-1][1].append(html)
