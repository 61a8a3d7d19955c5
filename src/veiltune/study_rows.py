"""A comparison's rows: what one setting of one design came to on one task. `veiltune.study_summary` makes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from veiltune.results import EnclaveCost, Spread
from veiltune.study_records import NothingCrossed, TextSample
from veiltune.study_terms import Knows, Phase, told_knows, told_phase, within
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
        tunes_apart: whether the owner tunes against an emulator of its own, so that by the table no state crosses meanwhile.
    """

    observers: tuple[str, ...] = ()
    clear_to: tuple[str, ...] = ()
    trained: str = "all"
    needs_enclave: bool = False
    tunes_apart: bool = False


@dataclass(frozen=True)
class Attacker:
    """Who is after what: figures of two of these are never put together.

    Attributes:
        observer: whose view is read.
        phase: whose texts it is after; ``None``: not stated.
        knows: what it takes beyond what that observer has; ``None``: not stated.
    """

    observer: str
    phase: Phase | None
    knows: Knows | None

    def __str__(self) -> str:
        return f"{self.observer}, {told_phase(self.phase) or 'texts not stated'}, knows {told_knows(self.knows)}"


@dataclass(frozen=True)
class AttackRow:
    """One attack, with its setting, on one row, over seeds.

    Attributes:
        attack: its name.
        setting: that are not its defaults.
        moment: the first texts that crossed, or the last.
        observer: whose view it read.
        knows: what it takes beyond what that observer has; ``None``: not stated.
        phase: whose texts it was after; ``None``: it is no attack on texts.
        figures: by metric; empty where no seed has any.
        absent: why there is none; None if there are figures, or nothing crossed.
        nothing: that nothing of the phase crossed, as the transcript says: of several seeds the most that did.
        notes: what befell single seeds beside those measured.
        samples: texts with what was made of them, of the first seed that has some.
    """

    attack: str
    setting: str
    moment: str
    observer: str
    knows: Knows | None
    phase: Phase | None
    figures: Mapping[str, Controlled]
    absent: Absent | None
    nothing: NothingCrossed | None = None
    notes: tuple[str, ...] = ()
    samples: tuple[TextSample, ...] = field(default=(), repr=False)

    @property
    def label(self) -> str:
        """Name, setting and moment, for people."""
        if self.nothing is not None:
            return "count of what crossed"
        setting = f" ({self.setting})" if self.setting else ""
        return f"{self.attack}{setting}{', last texts' if self.moment == 'last' else ''}"

    @property
    def attacker(self) -> Attacker:
        """Who made it."""
        return Attacker(self.observer, self.phase, self.knows)

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
class Uncrossed:
    """Nothing of the texts crossed to one observer: counted, and no figure of an attack."""

    counted: NothingCrossed
    seeds: int = 1

    @property
    def estimate(self) -> Estimate:
        """None of the text; a count has an interval of no width."""
        return Estimate(0.0, 0.0, 0.0, max(1, self.counted.others), self.seeds)

    def __str__(self) -> str:
        return f"nothing crossed (0 of {self.counted.passes + self.counted.others} recorded passes)"


@dataclass(frozen=True)
class Exposure:
    """How much of the text the observer who got most of it got.

    Attributes:
        estimate: of the reconstruction, from 0 to 1.
        observer: who.
        worst: by which attack; None where the design hands the text over, or nothing crossed.
        unmeasured: attackers of whom nothing was measured, so the true exposure may be higher.
        uncrossed: that nothing crossed, where that is all there is.
    """

    estimate: Estimate
    observer: str
    worst: Worst | None
    unmeasured: tuple[Attacker, ...] = ()
    uncrossed: Uncrossed | None = None

    @property
    def by_design(self) -> bool:
        """Whether it was not measured: the observer receives the text as it is."""
        return self.worst is None and self.uncrossed is None


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
        worst: the strongest text reconstruction by each attacker that the design or an attack names.
        worst_weights: the strongest recovery of weights by each attacker, where one was tried.
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
    worst: Mapping[Attacker, Worst | Uncrossed | Absent]
    worst_weights: Mapping[Attacker, Worst]
    cost: CostSummary | Absent
    simulated: bool
    reproducible: bool

    @property
    def label(self) -> str:
        """Design and setting, for people."""
        return self.design if self.setting in {"", self.design} else f"{self.design}: {self.setting}"

    @property
    def is_baseline(self) -> bool:
        """It is the plain model in the clear, whichever of its layers were trained; one without its trunk is not."""
        return self.design == "local" and self.options.get("layers") != "alone"

    @property
    def exposure(self) -> Exposure | Absent:
        """The strongest reconstruction by anyone of anything: what the strongest knowledge gives."""
        return self.exposure_to()

    def exposure_to(
        self,
        knows: Collection[Knows] | None = None,
        phases: Collection[Phase] | None = None,
        observer: str | None = None,
    ) -> Exposure | Absent:
        """The strongest reconstruction by whoever knows no more than that; a figure beats what was never measured.

        Args:
            knows: what attackers have beside their view (`study_terms.within`); ``None``: anything.
            phases: whose texts count; ``None``: all.
            observer: whose view counts; ``None``: of all the one who gets most.
        """
        if self.facts.clear_to and observer in {None, *self.facts.clear_to}:
            everything = Estimate(1.0, None, None, 1, max(1, len(self.seeds)))
            return Exposure(everything, self.facts.clear_to[0], None)
        asked = {
            who: worst
            for who, worst in self.worst.items()
            if within(who.knows, knows)
            and (phases is None or who.phase is None or who.phase in phases)
            and observer in {None, who.observer}
        }
        unmeasured = tuple(who for who, worst in asked.items() if isinstance(worst, Absent))
        found = {who: worst for who, worst in asked.items() if isinstance(worst, Worst)}
        if found:
            who = max(found, key=lambda name: found[name].figure.estimate.value)
            return Exposure(found[who].figure.estimate, who.observer, found[who], unmeasured)
        counted = next(((who, each) for who, each in asked.items() if isinstance(each, Uncrossed)), None)
        if counted is not None and not unmeasured:
            return Exposure(counted[1].estimate, counted[0].observer, None, (), counted[1])
        absent = [each for each in asked.values() if isinstance(each, Absent)]
        return next(iter(absent), Absent("missing", "no attack"))
