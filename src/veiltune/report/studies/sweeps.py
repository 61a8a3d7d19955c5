"""Sweeps: settings of one design that differ in one option, as lines of utility and of the strongest attack against it.

Attacks are drawn apart by the texts they are after and by what they know at most, as in the fronts (`studies.pareto`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veiltune.report.figures import INK, dress, new_figure, verbatim
from veiltune.report.studies.looks import Look, looks_of
from veiltune.report.studies.pareto import Panel, panels_of
from veiltune.report.studies.words import exposure_text, figure
from veiltune.study_rows import Row
from veiltune.study_values import Absent, Estimate

Value = float | str
_NO_KNOBS = frozenset({"key_seed", "seed"})


@dataclass(frozen=True)
class Line:
    """Settings that differ in the knob alone, on one task, in the order of its values.

    Attributes:
        name: what they have in common and other lines have not; the task.
        values: of the knob.
        rows: one each.
    """

    name: str
    values: tuple[Value, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Sweep:
    """All lines of one design over one knob."""

    model: str
    design: str
    knob: str
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """What it is of."""
        return f"{self.design}: {self.knob}"

    @property
    def file_name(self) -> str:
        """A name for its picture."""
        return re.sub(r"[^\w.-]+", "-", f"sweep-{self.design}-{self.knob}")

    @property
    def is_numeric(self) -> bool:
        """Whether all values are numbers."""
        return all(isinstance(value, float) for line in self.lines for value in line.values)


def find_sweeps(rows: Sequence[Row]) -> list[Sweep]:
    """Every option in which at least two settings of one design differ, all others being equal.

    An option that a setting does not name has the design's default.
    """
    sweeps: list[Sweep] = []
    for model, design in dict.fromkeys((row.model, row.design) for row in rows):
        mine = [
            (row, _complete(row))
            for row in rows
            if (row.model, row.design) == (model, design) and not row.facts.clear_to  # nothing there to turn a knob for
        ]
        knobs = dict.fromkeys(key for _, options in mine for key in options if key.split(".")[-1] not in _NO_KNOBS)
        found = [Sweep(model, design, knob, tuple(_lines(mine, knob))) for knob in knobs]
        sweeps += [sweep for sweep in found if sweep.lines]
    return sweeps


def _complete(row: Row) -> dict[str, Any]:
    """The row's options with the defaults of its design; as they are if this version knows no such design or option."""
    from pydantic import ValidationError

    from veiltune.designs import DESIGNS

    design = DESIGNS.get(row.design)
    if design is None:
        return dict(row.options)
    nested: dict[str, Any] = {}
    for key, value in row.options.items():
        *tables, leaf = key.split(".")
        target = nested
        for table in tables:
            target = target.setdefault(table, {})
        target[leaf] = value
    try:
        return {**_flat(design.options.model_validate(nested).model_dump(mode="json")), **row.options}
    except ValidationError:
        return dict(row.options)


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _lines(mine: Sequence[tuple[Row, Mapping[str, Any]]], knob: str) -> list[Line]:
    groups: dict[tuple[str, str], dict[Value, Row]] = {}
    fixed: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row, options in mine:
        rest = {key: value for key, value in options.items() if key != knob}
        group = (row.task, json.dumps(rest, sort_keys=True, default=str))
        groups.setdefault(group, {}).setdefault(_value(options.get(knob)), row)
        fixed.setdefault(group, rest)
    swept = [group for group, found in groups.items() if len(found) > 1]
    lines = []
    for group in swept:
        found = groups[group]
        values = sorted(found, key=lambda value: (isinstance(value, str), value if isinstance(value, float) else 0.0))
        name = ", ".join([group[0], *_distinct(fixed[group], [fixed[each] for each in swept])])
        lines.append(Line(name, tuple(values), tuple(found[value] for value in values)))
    return lines


def _distinct(options: Mapping[str, Any], everyone: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options in which these differ from some other line's."""
    return [
        f"{key.split('.')[-1]} {_tick(_value(value))}"
        for key, value in options.items()
        if any(each.get(key) != value for each in everyone)
    ]


def _value(value: Any) -> Value:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return "unset" if value is None else str(value)


def views_of(sweep: Sweep) -> list[Panel]:
    """Attackers of whom something was measured at some value; one that knows anything if there are none."""
    return panels_of("", [row for line in sweep.lines for row in line.rows])


def described(sweep: Sweep) -> str:
    """The lines in words: utility and reconstruction at each value."""
    views = views_of(sweep)
    return " ".join(f"{line.name}: {'; '.join(_told(line, views))}." for line in sweep.lines)


def _told(line: Line, views: Sequence[Panel]) -> list[str]:
    return [
        f"at {_tick(value)} utility {figure(row.utility.value) if isinstance(row.utility, Estimate) else row.utility}, "
        + ", ".join(f"{each.attackers} {exposure_text(each.exposure(row))}".strip() for each in views)
        for value, row in zip(line.values, line.rows, strict=True)
    ]


def _tick(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}"


# --- the figure -------------------------------------------------------------------------------------------------------


def draw(sweep: Sweep, *, width: float = 6.4, paper: str | None = None) -> Any:
    """Utility above, the strongest reconstruction below, both against the knob; a value that is absent leaves a gap.

    Args:
        sweep: from `find_sweeps`.
        width: inches.
        paper: colour behind; None: transparent, for a page.
    """
    rows, columns = math.ceil(len(sweep.lines) / 2), 2 if width > 6 else 1
    views = views_of(sweep)
    picture = new_figure(width, 3.0 + 3.0 * len(views) + 0.2 * rows * columns, paper)
    upper = picture.add_subplot(len(views) + 1, 1, 1)
    lowers = [picture.add_subplot(len(views) + 1, 1, at, sharex=upper) for at in range(2, len(views) + 2)]
    looks = looks_of([line.name for line in sweep.lines])
    places = _places(sweep)
    named = [("utility", ""), *(("strongest reconstruction", each.attackers) for each in views)]
    for axes, (name, attackers) in zip([upper, *lowers], named, strict=True):
        dress(axes)
        axes.set_ylabel(name, color=INK, fontsize=11)
        axes.set_title(verbatim(attackers), loc="left", color=INK, fontsize=10)
    for index, line in enumerate(sweep.lines):
        shift = index - (len(sweep.lines) - 1) / 2
        xs = [places[value] for value in line.values]
        xs = _shifted(xs, shift, places, logarithmic=_is_wide(sweep))
        _plot(upper, xs, [row.utility for row in line.rows], looks[line.name], line.name, joined=sweep.is_numeric)
        for lower, view in zip(lowers, views, strict=True):
            exposures = [view.exposure(row) for row in line.rows]
            values = [each if isinstance(each, Absent) else each.estimate for each in exposures]
            _plot(lower, xs, values, looks[line.name], line.name, joined=sweep.is_numeric)
    _axes(upper, lowers, sweep, places)
    legend = {
        "loc": "upper center",
        "bbox_to_anchor": (0.5, -0.24),
        "frameon": False,
        "fontsize": 10,
        "labelcolor": INK,
    }
    lowers[-1].legend(ncols=columns, **legend)
    return picture


def _is_wide(sweep: Sweep) -> bool:
    """Whether a logarithmic axis fits: numbers above zero that span more than a factor of twelve."""
    values = [value for line in sweep.lines for value in line.values if isinstance(value, float)]
    return sweep.is_numeric and min(values) > 0 and max(values) / min(values) > 12


def _places(sweep: Sweep) -> dict[Value, float]:
    """Where each value stands on the axis: at itself, or, where some are no numbers, one beside the other."""
    values = list(dict.fromkeys(value for line in sweep.lines for value in line.values))
    ordered = sorted(values, key=lambda value: (isinstance(value, str), value if isinstance(value, float) else 0.0))
    return {
        value: value if sweep.is_numeric and isinstance(value, float) else float(at) for at, value in enumerate(ordered)
    }


def _shifted(xs: list[float], shift: float, places: Mapping[Value, float], *, logarithmic: bool) -> list[float]:
    """Lines apart by a hair, so that their intervals do not lie on one another."""
    if logarithmic:
        return [x * (1 + 0.03 * shift) for x in xs]
    return [x + 0.008 * shift * (max(places.values()) - min(places.values())) for x in xs]


def _plot(
    axes: Any, xs: Sequence[float], values: Sequence[Estimate | Absent], look: Look, name: str, *, joined: bool
) -> None:
    ys = [math.nan if isinstance(value, Absent) else value.value for value in values]
    style = "-" if joined else ""
    axes.plot(xs, ys, marker=look.marker, color=look.colour, linestyle=style, linewidth=1.4, label=verbatim(name))
    for x, value in zip(xs, values, strict=True):
        if isinstance(value, Estimate):
            axes.plot([x, x], value.bounds, color=look.colour, linewidth=1.1, alpha=0.6)


def _axes(upper: Any, lowers: Sequence[Any], sweep: Sweep, places: Mapping[Value, float]) -> None:
    from matplotlib.ticker import NullLocator

    last = lowers[-1]
    if _is_wide(sweep):
        last.set_xscale("log", base=2)
    last.set_xticks(list(places.values()), [verbatim(_tick(value)) for value in places])
    last.xaxis.set_minor_locator(NullLocator())
    if not sweep.is_numeric:
        last.set_xlim(-0.5, len(places) - 0.5)
    for axes in lowers:
        axes.set_ylim(-0.04, 1.04)
    for axes in (upper, *lowers[:-1]):
        axes.tick_params(labelbottom=False)
    upper.set_title(verbatim(sweep.title), loc="left", color=INK, fontsize=12)
    last.set_xlabel(verbatim(sweep.knob), color=INK, fontsize=11)
