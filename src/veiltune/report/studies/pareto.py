"""Privacy against utility: which settings lie on the front, and a figure of it with cost as size.

Privacy is 1 less the strongest reconstruction over all observers, by attackers who know no more than the panel says and are
after the texts that it names. A setting is on the front if no other is at least as good in both and better in one. Intervals are
drawn, not used: of two settings whose intervals overlap neither may be the better one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veiltune.report.comparison import bytes_text
from veiltune.report.figures import INK, PAPER, dress, new_figure, verbatim
from veiltune.report.studies.labels import Anchor, place_labels
from veiltune.report.studies.looks import Look, looks_of
from veiltune.report.studies.words import exposure_text, figure
from veiltune.study_rows import CostSummary, Exposure, Row, Worst
from veiltune.study_terms import ALL_KNOWS, ALL_PHASES, Knows, Phase, told_knows, told_phase
from veiltune.study_values import Absent, Estimate

_A: Mapping[Knows, str] = {"public_ancestor": "a "}
SMALLEST, LARGEST = 40.0, 420.0
"""Areas of markers, in square points."""

CHARACTER = 0.09
"""Inches of one in the key, generously: two columns of names that are too long for the panel would leave it no width."""


@dataclass(frozen=True)
class Point:
    """One setting on one task.

    Attributes:
        label: design and setting.
        design: its name.
        privacy: 1 - reconstruction, with its interval.
        utility: with its interval.
        num_bytes: a step; None if no record says.
        by_design: the text is in the clear at an observer; nothing was attacked.
        uncrossed: nothing of the texts crossed, which was counted; nothing was attacked.
    """

    label: str
    design: str
    privacy: Estimate
    utility: Estimate
    num_bytes: float | None
    by_design: bool
    uncrossed: bool = False


@dataclass(frozen=True)
class Panel:
    """One task's rows, as attackers of one kind see them.

    Attributes:
        name: of the task, with the model where there are several.
        rows: of it.
        phase: whose texts they are after; ``None``: any, where nothing was attacked.
        knows: what they know at most; ``None``: as above.
    """

    name: str
    rows: Sequence[Row]
    phase: Phase | None = None
    knows: Knows | None = None

    @property
    def title(self) -> str:
        """What it is of."""
        return f"{self.name}: {self.attackers}" if self.attackers else self.name

    @property
    def attackers(self) -> str:
        """Who attacks, in words; empty where nothing was measured."""
        if self.phase is None or self.knows is None:
            return ""
        besides = "no more" if self.knows == "nothing" else f"at most {_A.get(self.knows, '')}{told_knows(self.knows)}"
        return f"{told_phase(self.phase)}, by whoever knows {besides}"

    def exposure(self, row: Row) -> Exposure | Absent:
        """What these attackers get of a row's texts."""
        return row.exposure_to(
            None if self.knows is None else (self.knows,), None if self.phase is None else (self.phase,)
        )


def panels_of(name: str, rows: Sequence[Row]) -> list[Panel]:
    """A panel for each phase and each knowledge of which something was measured; one alone where nothing was."""
    measured = {(who.phase, who.knows) for row in rows for who, worst in row.worst.items() if isinstance(worst, Worst)}
    found = [
        Panel(name, rows, phase, knows) for phase in ALL_PHASES for knows in ALL_KNOWS if (phase, knows) in measured
    ]
    return found or [Panel(name, rows)]


def points_of(panel: Panel) -> tuple[list[Point], list[str]]:
    """The points of a panel's rows, and why each other row has none."""
    points: list[Point] = []
    left_out: list[str] = []
    for row in panel.rows:
        exposure = panel.exposure(row)
        if isinstance(row.utility, Absent) or isinstance(exposure, Absent) or not math.isfinite(row.utility.value):
            why = row.utility if isinstance(row.utility, Absent) else exposure_text(exposure)
            left_out.append(f"{row.label} ({why})")
            continue
        low, high = exposure.estimate.low, exposure.estimate.high
        privacy = Estimate(
            1 - exposure.estimate.value,
            None if high is None else 1 - high,
            None if low is None else 1 - low,
            exposure.estimate.n,
            exposure.estimate.seeds,
        )
        num_bytes = row.cost.bytes_per_step if isinstance(row.cost, CostSummary) else None
        kinds = (exposure.by_design, exposure.uncrossed is not None)
        points.append(Point(row.label, row.design, privacy, row.utility, num_bytes, *kinds))
    return points, left_out


def front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats, from the most useful to the most private."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.privacy.value, -p.utility.value)):
        if not best or point.utility.value > best[-1].utility.value or _same(point, best[-1]):
            best.append(point)
    return best[::-1]


def _same(a: Point, b: Point) -> bool:
    return (a.privacy.value, a.utility.value) == (b.privacy.value, b.utility.value)


def described(panel: Panel) -> str:
    """A panel in words."""
    points, left_out = points_of(panel)
    ahead = "; ".join(
        f"{p.label}, utility {figure(p.utility.value)}, privacy {figure(p.privacy.value)}" for p in front(points)
    )
    rest = f" Not drawn: {'; '.join(left_out)}." if left_out else ""
    return f"{len(points)} settings. On the front: {ahead or 'none'}.{rest}"


def draw(panels: Sequence[Panel], *, width: float = 6.4, paper: str | None = None) -> Any:
    """The panels, side by side two at a time.

    Args:
        panels: of `panels_of`.
        width: of a panel, in inches.
        paper: colour behind; None: transparent, for a page.
    """
    picture, drawn = _figure(panels, width, paper, numbered=False)
    if any(place_labels(axes, anchors, [each.text for each in anchors]) is None for axes, anchors in drawn):
        picture, drawn = _figure(panels, width, paper, numbered=True)
        for axes, anchors in drawn:
            place_labels(axes, anchors, [str(number) for number in range(1, len(anchors) + 1)], anywhere=True)
    return picture


def _figure(
    panels: Sequence[Panel], width: float, paper: str | None, *, numbered: bool
) -> tuple[Any, list[tuple[Any, list[Anchor]]]]:
    """The figure without labels, its layout settled, and what is to be labelled in each panel."""
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    labels = [[row.label for row in panel.rows] for panel in panels] if numbered else [[]]
    longest = max((len(label) for each in labels for label in each), default=0)
    ncols = 1 if 2 * CHARACTER * (longest + 6) > width else 2
    height = 5.8 + (2 - ncols) * 0.8 + 0.2 * math.ceil(max(map(len, labels)) / ncols)
    picture = new_figure(width * columns, height * lines, paper)
    picture.get_layout_engine().set(h_pad=0.16)  # inches: text is a little taller at other resolutions
    looks = looks_of([row.design for panel in panels for row in panel.rows])
    drawn = [
        (axes, _panel(axes, panel, looks, numbered=numbered, ncols=ncols))
        for index, panel in enumerate(panels)
        for axes in [picture.add_subplot(lines, columns, index + 1)]
    ]
    for _ in range(2):  # the key hangs by a share of the axes' height, which the first layout changes
        picture.canvas.draw()
    picture.set_layout_engine("none")
    return picture, drawn


def _panel(axes: Any, panel: Panel, looks: dict[str, Look], *, numbered: bool, ncols: int) -> list[Anchor]:
    points, _ = points_of(panel)
    dress(axes)
    heading = "\n".join(part for part in (panel.name, panel.attackers) if part)
    axes.set_title(verbatim(heading), loc="left", color=INK, fontsize=11)
    axes.set_xlabel("privacy (1 − strongest text reconstruction)", color=INK, fontsize=11)
    metrics = " or ".join(dict.fromkeys(row.metric for row in panel.rows if row.metric))
    axes.set_ylabel(verbatim(f"utility ({metrics})"), color=INK, fontsize=11)
    if not points:
        axes.text(0.5, 0.5, "no setting has both figures", ha="center", color=INK, transform=axes.transAxes)
        return []
    _limits(axes, points)
    _front_line(axes, points)
    anchors = [_marker(axes, point, points, looks[point.design]) for point in points]
    _legend(axes, points, anchors if numbered else (), ncols)
    return anchors


def _limits(axes: Any, points: Sequence[Point]) -> None:
    """Room for every interval, and for labels."""
    ends = [end for point in points for end in point.utility.bounds]
    margin = 0.16 * max(max(ends) - min(ends), 0.05)
    axes.set_xlim(-0.08, 1.08)
    axes.set_ylim(min(ends) - margin, max(ends) + margin)


def _front_line(axes: Any, points: Sequence[Point]) -> None:
    """From the left edge to the bottom one: what is above and to the right of it, no setting reaches."""
    ahead = front(points)
    xs = [axes.get_xlim()[0], *(point.privacy.value for point in ahead), ahead[-1].privacy.value]
    ys = [ahead[0].utility.value, *(point.utility.value for point in ahead), axes.get_ylim()[0]]
    axes.step(xs, ys, where="pre", color=INK, linewidth=1.2, linestyle=(0, (5, 3)), alpha=0.6, zorder=2)


def _marker(axes: Any, point: Point, points: Sequence[Point], look: Look) -> Anchor:
    x, y = point.privacy.value, point.utility.value
    (left, right), (low, high) = point.privacy.bounds, point.utility.bounds
    axes.plot([left, right], [y, y], color=look.colour, linewidth=1.1, alpha=0.55, zorder=3)
    axes.plot([x, x], [low, high], color=look.colour, linewidth=1.1, alpha=0.55, zorder=3)
    area = marker_area(point.num_bytes, [each.num_bytes for each in points])
    face = PAPER if point.by_design or point.uncrossed else look.colour
    axes.scatter(
        [x],
        [y],
        s=area,
        marker=look.marker,
        facecolor=face,
        edgecolor=look.colour,
        linewidth=1.5,
        linestyle=":" if point.uncrossed else "-",
        zorder=5 - area / (2 * LARGEST),
    )
    return Anchor(x, y, math.sqrt(area) / 2, point.label, look.colour)


def marker_area(num_bytes: float | None, everyone: Sequence[float | None]) -> float:
    """A marker's area, linear in the logarithm of its bytes; the smallest where there are none or no record."""
    known = [math.log10(max(each, 1.0)) for each in everyone if each is not None]
    if num_bytes is None or not known or max(known) == min(known):
        return SMALLEST
    share = (math.log10(max(num_bytes, 1.0)) - min(known)) / (max(known) - min(known))
    return SMALLEST + share * (LARGEST - SMALLEST)


def _legend(axes: Any, points: Sequence[Point], numbered: Sequence[Anchor], ncols: int) -> None:
    """What the smallest and the largest marker stand for, the other signs, and the names of numbered points."""
    known = sorted(point.num_bytes for point in points if point.num_bytes is not None)
    handles = [axes.plot([], [], color=INK, linewidth=1.2, linestyle=(0, (5, 3)), alpha=0.6, label="front")[0]]
    if known and known[0] < known[-1]:
        for value in (known[0], known[-1]):
            area = marker_area(value, known)
            text = f"{bytes_text(value)} a step"
            handles.append(axes.scatter([], [], s=area, facecolor="none", edgecolor=INK, label=text))
    if any(point.uncrossed for point in points):
        label = "dotted: nothing crossed"
        handles.append(
            axes.scatter([], [], s=60, facecolor=PAPER, edgecolor=INK, linewidth=1.5, linestyle=":", label=label)
        )
    if any(point.by_design for point in points):
        label = "hollow: in the clear by design"
        handles.append(axes.scatter([], [], s=60, facecolor=PAPER, edgecolor=INK, linewidth=1.5, label=label))
    for number, anchor in enumerate(numbered, 1):
        handles.append(axes.plot([], [], linestyle="", label=verbatim(f"{number}  {anchor.text}"))[0])
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=ncols,
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        borderpad=0.2,
        columnspacing=1.6,
    )
