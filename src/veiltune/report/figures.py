"""What all figures share: colours, captions that are taken as they are, and how a figure becomes a file or part of a page."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind readers can tell apart. Black is the last: it does not show on a dark page."""

INK, FAINT, PAPER = "#1a1b1c", "#d4d5d6", "#fdfefe"
"""Of text and axes, of grids, of what lies behind: a page puts its own in their places (see `svg`)."""

_THEMED = {INK: "currentColor", FAINT: "var(--faint)", PAPER: "var(--paper)"}


def verbatim(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def new_figure(width: float, height: float, paper: str | None = None) -> Any:
    """An empty figure in inches that arranges its parts itself; ``paper`` lies behind it, None: nothing does."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=paper or "none")
    FigureCanvasAgg(figure)  # what measures texts
    return figure


def dress(axes: Any) -> None:
    """Axes in the page's colours: two of four sides, and a faint grid behind."""
    axes.set_facecolor("none")
    axes.grid(visible=True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=10)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(INK)


def write_png(figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def svg(figure: Any, *, label: str, prefix: str) -> str:
    """A figure as inline SVG that takes the page's colours and needs no file.

    Args:
        figure: drawn with `INK`, `FAINT` and `PAPER`.
        label: what it shows, for who cannot see it.
        prefix: put before identifiers, which are the page's: different for each figure.
    """
    import matplotlib as mpl

    written = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for colour, themed in _THEMED.items():
        text = text.replace(colour, themed)
    # a point is 4/3 of a pixel; a wide page may enlarge by a quarter
    size = re.search(r'<svg[^>]*?width="([\d.]+)pt"', text)
    text = re.sub(r'(<svg[^>]*?) width="[\d.]+pt"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", text, count=1)
    style = f' style="max-width:{float(size[1]) * 5 / 3:.0f}px"' if size else ""
    return text.replace("<svg", f'<svg role="img" aria-label="{_attribute(label)}"{style}', 1)


def _attribute(text: str) -> str:
    from html import escape

    return escape(" ".join(text.split()), quote=True)
