"""The two controls that every figure carries, and the rule that no figure is published without them.

*Leaky control*: the same attack on the same texts with protection off. It must succeed; else the attack is broken, and that it
fails under protection says nothing. *Shuffled control*: what was found, paired with other texts. It must fall to chance, which is
what the true texts score against one another (their common phrases and templates); else the score measures something that the
attack did not get out of the transcript.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from veiltune.attacks import scores
from veiltune.attacks.scores import PerSequence
from veiltune.errors import ExactnessError, UserError
from veiltune.study_terms import Knows, Phase

T = TypeVar("T")
Scorer = Callable[[Sequence[T], Sequence[T]], PerSequence]

MAX_SHIFTS = 8
CHANCE_MARGIN = 0.1
"""By how much the shuffled control may exceed what true texts score against one another: guesses of frequent tokens do."""


@dataclass(frozen=True)
class Finding:
    """One figure with its controls: the only form in which the result of an attack leaves the suite.

    Attributes:
        attack: its name.
        observer: whose view it read.
        design: the design of the run.
        setting: of the attack.
        metric: what was measured.
        value: the mean over sequences (or tensors).
        n: how many those were.
        ci95: the bootstrap interval of the mean; None for fewer than two.
        leaky_control: the same with protection off.
        shuffled_control: the same paired with other texts.
        knows: what the attack takes beyond what its observer has; ``None``: of an earlier version.
        phase: whose texts it was after; ``None``: it is no attack on texts, or of an earlier version.

    Raises:
        ValueError: a control is missing or not finite.
    """

    attack: str
    observer: str
    design: str
    setting: str
    metric: str
    value: float
    n: int
    ci95: tuple[float, float] | None
    leaky_control: float
    shuffled_control: float
    knows: Knows | None = None
    phase: Phase | None = None

    def __post_init__(self) -> None:
        for name in ("value", "leaky_control", "shuffled_control"):
            figure = getattr(self, name)
            if not isinstance(figure, float) or not math.isfinite(figure):
                raise ValueError(
                    f"{self.attack} {self.metric}: {name} is {figure!r}; a row without it is not published"
                )

    def as_row(self) -> dict[str, Any]:
        """As a row of a benchmark."""
        return asdict(self)


def shuffled(score: Scorer[T], truth: Sequence[T], found: Sequence[T], others: Sequence[T] = ()) -> dict[str, float]:
    """Mean scores of everything found against the truths of others: cyclic shifts, as many as there are, up to `MAX_SHIFTS`.

    Where there is but one sequence it is paired with ``others``.

    Raises:
        UserError: there is but one sequence, and nothing to pair it with.
    """
    if len(truth) == 1 and others:
        return scores.means(score(others[:MAX_SHIFTS], list(found) * len(others[:MAX_SHIFTS])))
    if len(truth) < 2:
        raise UserError(
            "one sequence alone cannot be paired with another: there is no shuffled control",
            hint="attack at least two sequences",
        )
    totals: dict[str, list[float | None]] = {}
    for shift in range(1, min(len(truth), MAX_SHIFTS + 1)):
        others = [*truth[shift:], *truth[:shift]]
        for name, values in score(others, found).items():
            totals.setdefault(name, []).extend(values)
    return scores.means(totals)


@dataclass(frozen=True)
class Trial:
    """What an attack found of some truth, with and without protection, and how to score it.

    ``leaky_truth`` is what there was to find without protection, where that is something else. ``others`` are truths of which
    nothing was attacked, for the shuffled control of a single one.
    """

    score: Scorer[Any]
    truth: Sequence[Any]
    found: Sequence[Any]
    leaky_found: Sequence[Any]
    leaky_truth: Sequence[Any] | None = None
    others: Sequence[Any] = ()

    def figures(self, generator: torch.Generator) -> dict[str, dict[str, Any]]:
        """By metric: value, n, ci95, leaky_control, shuffled_control; only metrics that have all of them."""
        protected, leaky = (
            self.score(self.truth, self.found),
            self.score(self.truth if self.leaky_truth is None else self.leaky_truth, self.leaky_found),
        )
        crossed, leaks = shuffled(self.score, self.truth, self.found, self.others), scores.means(leaky)
        return {
            name: {
                "value": value,
                "n": sum(each is not None for each in values),
                "ci95": scores.bootstrap(values, generator),
                "leaky_control": leaks[name],
                "shuffled_control": crossed[name],
            }
            for name, values in protected.items()
            if (value := scores.mean(values)) is not None and name in leaks and name in crossed
        }

    def chance(self) -> dict[str, float]:
        """What the truths score against one another."""
        return shuffled(self.score, self.truth, self.truth, self.others)


def require_controls(
    attack: str, control: tuple[str, float], figures: Mapping[str, Mapping[str, Any]], chance: Mapping[str, float]
) -> None:
    """Refuse figures whose controls failed.

    Args:
        attack: its name.
        control: metric, and the least value of it that the leaky control must reach.
        figures: of `Trial.figures`.
        chance: of `Trial.chance`.

    Raises:
        ExactnessError: a control failed, or was not measured: nothing of the attack may be published.
    """
    metric, floor = control
    if metric not in figures:
        raise ExactnessError(f"{attack} has no {metric}, so no control", hint="give it texts that the metric can score")
    leaky, crossed = figures[metric]["leaky_control"], figures[metric]["shuffled_control"]
    if leaky < floor:
        raise ExactnessError(
            f"the leaky control of {attack} failed: {metric} {leaky:.3f} without protection, at least {floor:g} is expected",
            hint="the attack is too weak to say anything here: give it more (corpus, pairs, shortlist, training)",
        )
    ceiling = chance[metric] + CHANCE_MARGIN
    if crossed > ceiling:
        raise ExactnessError(
            f"the shuffled control of {attack} failed: {metric} {crossed:.3f} against others, chance is {chance[metric]:.3f}",
            hint="the texts resemble one another too much, or the score measures something else",
        )
