"""The values a comparison's summary is made of: an estimate with its interval, and why a value is absent.

Several seeds of one setting are measured on the same items, so their intervals are not independent and are not shrunk: the
estimate is the seeds' mean, its interval reaches from the lowest lower end to the highest upper end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from veiltune.results import Measurement
from veiltune.study_records import AttackFigure


@dataclass(frozen=True)
class Absent:
    """A value that is not there, and why. It is never shown as zero.

    Attributes:
        status: ``missing``: no record; ``failed``: the cell ended in an error; ``withheld``: an attack whose controls failed.
        reason: in words; empty where there are none.
    """

    status: Literal["missing", "failed", "withheld"]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status


@dataclass(frozen=True)
class Estimate:
    """A figure over one or more seeds.

    Attributes:
        value: mean over seeds.
        low: lower end of the 95% interval, None where no seed has one.
        high: upper end.
        n: items (or sequences) of one seed, the fewest.
        seeds: how many runs it is the mean of.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    seeds: int = 1

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval; the value itself where there is none."""
        return (self.value if self.low is None else self.low, self.value if self.high is None else self.high)


@dataclass(frozen=True)
class Controlled:
    """An attack's estimate with its controls, of several seeds the weaker ones: lowest leaky, highest shuffled."""

    estimate: Estimate
    leaky: float
    shuffled: float


def pooled(figures: Sequence[Measurement | AttackFigure]) -> Estimate:
    """One estimate of the same figure over seeds; see the head of this module.

    An interval that a seed lacks is missed, not made up: then the ends come from the seeds that have one, and hold
    every value.

    Raises:
        ValueError: there are no figures.
    """
    if not figures:
        raise ValueError("no figures to pool")
    values = [figure.value for figure in figures]
    ends = [figure.ci95 for figure in figures if figure.ci95 is not None]
    low = min(*values, *(end[0] for end in ends)) if ends else None
    high = max(*values, *(end[1] for end in ends)) if ends else None
    return Estimate(math.fsum(values) / len(values), low, high, min(figure.n for figure in figures), len(figures))


def controlled(figures: Sequence[AttackFigure]) -> Controlled:
    """The same of an attack's figure, with controls."""
    return Controlled(
        pooled(figures),
        min(figure.leaky_control for figure in figures),
        max(figure.shuffled_control for figure in figures),
    )


def difference(of: Estimate, to: Estimate) -> Estimate:
    """``of - to`` with an interval from the two intervals alone.

    *Reference.* MOVER, Zou and Donner 2008 (doi 10.1002/sim.3095); for Wilson intervals it is Newcombe's method 10 (1998).
    Both were measured on the same items, and the records do not hold which items were answered; so they are taken as
    independent, which makes the interval too wide where they agree, as they mostly do.

    Returns:
        The difference; without an interval if either has none.
    """
    value = of.value - to.value
    n, seeds = min(of.n, to.n), min(of.seeds, to.seeds)
    if of.low is None or of.high is None or to.low is None or to.high is None:
        return Estimate(value, None, None, n, seeds)
    below = math.hypot(of.value - of.low, to.high - to.value)
    above = math.hypot(of.high - of.value, to.value - to.low)
    return Estimate(value, value - below, value + above, n, seeds)
