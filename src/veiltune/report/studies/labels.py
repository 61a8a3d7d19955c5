"""Labels of points that do not cover one another, nor a marker: each takes the nearest free place around its point.

Where they do not all fit, nothing is written, and whoever asked may try shorter ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veiltune.report.figures import INK, verbatim

SIZE = 9.5
_RADII = (6.0, 14.0, 24.0, 36.0, 52.0, 70.0, 92.0)
_ANGLES = (20, 340, 160, 200, 90, 270, 50, 310, 130, 230, 0, 180)


@dataclass(frozen=True)
class Anchor:
    """A point that is to be labelled: in the axes' data, with its marker's radius in points."""

    x: float
    y: float
    radius: float
    text: str
    colour: str


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        """Whether the two share any area."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def holds(self, other: Box) -> bool:
        """Whether the other lies within."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.bottom <= other.bottom
            and other.top <= self.top
        )


def place_labels(
    axes: Any, anchors: Sequence[Anchor], texts: Sequence[str], *, anywhere: bool = False
) -> list[Box] | None:
    """Write a text at each point and return where they came to stand; None, and nothing written, if one has no place.

    Args:
        axes: of a figure whose layout is settled and will not change.
        anchors: the points.
        texts: one each.
        anywhere: write them whatever they cover, if it must be.
    """
    boxes = _free_places(axes, anchors, texts)
    if boxes is None and anywhere:
        boxes = _right_of(axes, anchors, texts)
    for anchor, text, box in zip(anchors, texts, boxes or ()):
        _write(axes, anchor, text, box)
    return boxes


def _sizes(axes: Any, texts: Sequence[str]) -> list[tuple[float, float]]:
    """Width and height of each text in pixels."""
    renderer = axes.figure.canvas.get_renderer()
    sizes = []
    for text in texts:
        artist = axes.text(0, 0, verbatim(text), fontsize=SIZE)
        extent = artist.get_window_extent(renderer)
        artist.remove()
        sizes.append((float(extent.width), float(extent.height)))
    return sizes


def _free_places(axes: Any, anchors: Sequence[Anchor], texts: Sequence[str]) -> list[Box] | None:
    """A place for each text, or None if one has none."""
    per_point = axes.figure.dpi / 72
    inside = axes.get_window_extent()
    frame = Box(*(float(end) for end in (inside.x0, inside.y0, inside.x1, inside.y1)))
    centres = [_pixels(axes, anchor) for anchor in anchors]
    taken = [
        Box(x - r, y - r, x + r, y + r)
        for (x, y), r in zip(centres, [(anchor.radius + 1.5) * per_point for anchor in anchors])
    ]
    placed: list[Box] = []
    for anchor, centre, size in zip(anchors, centres, _sizes(axes, texts)):
        places = _around(centre, anchor.radius * per_point, size, per_point)
        free = (box for box in places if frame.holds(box) and not any(box.meets(other) for other in taken))
        found = next(free, None)
        if found is None:
            return None
        placed.append(found)
        taken.append(found)
    return placed


def _pixels(axes: Any, anchor: Anchor) -> tuple[float, float]:
    x, y = axes.transData.transform((anchor.x, anchor.y))
    return float(x), float(y)


def _around(centre: tuple[float, float], radius: float, size: tuple[float, float], per_point: float) -> list[Box]:
    """Boxes of a size around a point, the nearest first."""
    width, height = size
    boxes = []
    for distance in _RADII:
        for angle in _ANGLES:
            reach = radius + distance * per_point
            x = centre[0] + reach * math.cos(math.radians(angle))
            y = centre[1] + reach * math.sin(math.radians(angle))
            left = x if math.cos(math.radians(angle)) > 0.1 else x - width
            left = x - width / 2 if abs(math.cos(math.radians(angle))) <= 0.1 else left
            boxes.append(Box(left, y - height / 2, left + width, y + height / 2))
    return boxes


def _right_of(axes: Any, anchors: Sequence[Anchor], texts: Sequence[str]) -> list[Box]:
    """The last resort: numbers beside their points, whatever they cover."""
    boxes = []
    for anchor, (width, height) in zip(anchors, _sizes(axes, texts)):
        x, y = _pixels(axes, anchor)
        boxes.append(Box(x + 8, y - height / 2, x + 8 + width, y + height / 2))
    return boxes


def _write(axes: Any, anchor: Anchor, text: str, box: Box) -> None:
    """A label in its place, with a thin line to its point if it stands away from it."""
    middle = ((box.left + box.right) / 2, (box.bottom + box.top) / 2)
    to_data = axes.transData.inverted().transform
    x, y = to_data(middle)
    axes.text(x, y, verbatim(text), fontsize=SIZE, color=INK, ha="center", va="center", zorder=6)
    point = _pixels(axes, anchor)
    near = (min(max(point[0], box.left), box.right), min(max(point[1], box.bottom), box.top))
    gap = math.dist(point, near) - anchor.radius * axes.figure.dpi / 72
    if gap > 14 * axes.figure.dpi / 72:
        end = to_data(near)
        axes.plot([anchor.x, end[0]], [anchor.y, end[1]], color=anchor.colour, linewidth=0.7, alpha=0.7, zorder=2.5)
