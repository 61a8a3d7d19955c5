"""A colour and a marker for each design, the same in every figure of a report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from veiltune.report.figures import COLOURS

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")


@dataclass(frozen=True)
class Look:
    """How a design, or one line of a sweep, is drawn."""

    colour: str
    marker: str


def looks_of(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name in the order of their first appearance; past six, colours come again with other markers."""
    bright = COLOURS[:-1]  # black is not for dark pages
    return {
        name: Look(bright[index % len(bright)], _MARKERS[index % len(_MARKERS)])
        for index, name in enumerate(dict.fromkeys(names))
    }
