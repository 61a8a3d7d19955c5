"""A comparison's rows: what one setting of one design came to on one task. `veiltune.study_summary` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from veiltune.results import EnclaveCost, Spread
from veiltune.study_records import TextSample
from veiltune.study_values import Absent, Controlled, Estimate

TEXT_METRICS = ("rougeL", "token_recovery")
"""What tells how much text was reconstructed, from 0 to 1; of an attack, the first of these that it has."""
STATE_METRIC = "state_cosine"
"""Stands in where no attack of an observer reconstructs text."""
WEIGHT_METRIC = "weight_cosine"


@dataclass(frozen=True)
class DesignFacts:
    """What the table of designs says of one, as far as a comparison needs it.

    Attributes:
        observers: parties beside the owner and enclaves that receive anything but figures and requests.
        clear_to: those of them that receive the owner's training text as it is.
        trained: the option ``layers`` of the `local` runs that train the same layers.
        needs_enclave: whether trusted hardware is part of it.
    """

    observers: tuple[str, ...] = ()
    clear_to: tuple[str, ...] = ()
    trained: str = "all"
    needs_enclave: bool = False


@dataclass(frozen=True)
class AttackRow:
    """One attack, with its setting, on one row, over seeds.

    Attributes:
        attack: its name.
        setting: that are not its defaults.
        moment: the first texts that crossed, or the last.
        observer: whose view it read.
        figures: by metric; empty where no seed has any.
        absent: why there is none; None if there are figures.
        notes: what befell single seeds beside those measured.
        samples: texts with what was made of them, of the first seed that has some.
    """

    attack: str
    setting: str
    moment: str
    observer: str
    figures: Mapping[str, Controlled]
    absent: Absent | None
    notes: tuple[str, ...] = ()
    samples: tuple[TextSample, ...] = field(default=(), repr=False)

    @property
    def label(self) -> str:
        """Name, setting and moment, for people."""
        setting = f" ({self.setting})" if self.setting else ""
        return f"{self.attack}{setting}{', last texts' if self.moment == 'last' else ''}"

    @property
    def text_metric(self) -> str | None:
        """The metric that tells how much text it got; None if it is no attack on text."""
        return next((metric for metric in TEXT_METRICS if metric in self.figures), None)


@dataclass(frozen=True)
class Worst:
    """The strongest reconstruction from what one observer saw."""

    by: AttackRow
    metric: str

    @property
    def figure(self) -> Controlled:
        """The figure with its controls."""
        return self.by.figures[self.metric]


@dataclass(frozen=True)
class Exposure:
    """How much of the text the observer who got most of it got.

    Attributes:
        estimate: of the reconstruction, from 0 to 1.
        observer: who.
        worst: by which attack; None where the design hands the text over and no attack is needed.
        unmeasured: observers of whom nothing was measured, so the true exposure may be higher.
    """

    estimate: Estimate
    observer: str
    worst: Worst | None
    unmeasured: tuple[str, ...] = ()

    @property
    def by_design(self) -> bool:
        """Whether it was not measured: the observer receives the text as it is."""
        return self.worst is None


@dataclass(frozen=True)
class CostSummary:
    """What runs of one row cost; of several seeds the largest, of seconds the middle median with the outer percentiles.

    Attributes:
        bytes_per_step: between all parties.
        link_bytes: whole frames over a whole run, by directed pair of parties.
        seconds_per_step: of an optimiser step.
        step_ratio: to the plain step, where it was timed in the same run.
        owner_peak: bytes of the owner's process; None where all parties were one process.
        whole_peak: the sum of the processes' peaks, which bounds what they took at one time.
        revealed: share of the model's parameters in the clear, by observer.
        enclave: the enclave's shares.
        crossings_per_step: messages over the enclave's, or the cut's, border.
    """

    bytes_per_step: float | None
    link_bytes: Mapping[str, int]
    seconds_per_step: Spread | None
    step_ratio: Spread | None
    owner_peak: int | None
    whole_peak: int | None
    revealed: Mapping[str, float]
    enclave: EnclaveCost
    crossings_per_step: float | None


@dataclass(frozen=True)
class Row:
    """One setting of one design on one task.

    Attributes:
        model: as configured.
        design: its name.
        setting: the study's label of its options.
        task: the victim's.
        options: of the design, flat; of the first seed.
        facts: what the table of designs says of it.
        seeds: that finished.
        notes: what befell other seeds ("seed 2 failed: …").
        absent: why there is no run; None if one finished.
        metric: that the utility is told in.
        utility: after tuning.
        before: before the first step.
        on_emulator: with the emulator in the trunk's place.
        baseline: the setting of the unprotected row it is compared with; None if there is none.
        difference: of utilities, to that row; None for an unprotected row.
        attacks: on it.
        worst: text reconstruction, by observer that the design or an attack names.
        worst_weights: recovery of weights, by observer, where one was tried.
        cost: of its runs.
        simulated: an enclave of its runs was no hardware: it protected nothing.
        reproducible: keys came from a seed.
    """

    model: str
    design: str
    setting: str
    task: str
    options: Mapping[str, Any]
    facts: DesignFacts
    seeds: tuple[int, ...]
    notes: tuple[str, ...]
    absent: Absent | None
    metric: str
    utility: Estimate | Absent
    before: Estimate | None
    on_emulator: Estimate | None
    baseline: str | None
    difference: Estimate | Absent | None
    attacks: tuple[AttackRow, ...]
    worst: Mapping[str, Worst | Absent]
    worst_weights: Mapping[str, Worst]
    cost: CostSummary | Absent
    simulated: bool
    reproducible: bool

    @property
    def label(self) -> str:
        """Design and setting, for people."""
        return self.design if self.setting in {"", self.design} else f"{self.design}: {self.setting}"

    @property
    def exposure(self) -> Exposure | Absent:
        """The strongest reconstruction over all observers; an attack's figure beats what was never measured."""
        if self.facts.clear_to:
            everything = Estimate(1.0, None, None, 1, max(1, len(self.seeds)))
            return Exposure(everything, self.facts.clear_to[0], None)
        found = {who: worst for who, worst in self.worst.items() if isinstance(worst, Worst)}
        if not found:
            return next(
                (each for each in self.worst.values() if isinstance(each, Absent)), Absent("missing", "no attack")
            )
        who = max(found, key=lambda name: found[name].figure.estimate.value)
        unmeasured = tuple(name for name in self.worst if name not in found)
        return Exposure(found[who].figure.estimate, who, found[who], unmeasured)
