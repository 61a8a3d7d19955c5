"""One need held against one row of measured records: the figure, the bound, and in words why it is kept or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from veiltune.designs import DESIGNS
from veiltune.evaluation.advice_needs import Needs, Observer
from veiltune.study_rows import Attacker, Row, Uncrossed
from veiltune.study_terms import Phase, told_knows, told_phase, within
from veiltune.study_values import Absent, Estimate

By = Literal["interval", "point", "design", "transcript", "figure", "nothing"]
"""``interval``, ``point``: of a measured estimate; ``design``: by the table of messages; ``transcript``: counted that nothing
crossed; ``figure``: has no interval; ``nothing``: no record."""

WEIGHTS_CLEAR = frozenset({"WeightShard", "EmulatorShard"})
WEIGHTS = WEIGHTS_CLEAR | {"TrunkShard"}
"""Kinds of message that carry the model."""


@dataclass(frozen=True)
class Check:
    """One need held against one record.

    Attributes:
        need: its name, as in the file of needs.
        task: on which task; None where the need is not of a task.
        measured: the figure that the bound was compared with: an end of the interval where that was asked for.
        bound: the need's.
        is_met: whether it is kept.
        by: what decided.
        reason: in words.
    """

    need: str
    task: str | None
    measured: float | None
    bound: float | bool
    is_met: bool
    by: By
    reason: str

    def __str__(self) -> str:
        return f"{self.need}{f' ({self.task})' if self.task else ''}: {self.reason}"


def checks_of(needs: Needs, row: Row) -> Iterator[Check]:
    """Every stated need against one task's row."""
    if isinstance(row.utility, Absent):  # nothing ran: one reason is enough
        yield _unknown("records", row, True, str(row.utility))
        return
    if needs.utility.floor is not None:
        yield _compare("utility.floor", row, row.utility, needs.utility.floor, needs, at_least=True)
    if needs.utility.largest_loss is not None:
        yield _loss(needs, row, needs.utility.largest_loss)
    for observer, bounds in needs.observer.items():
        name = f"observer.{observer}"
        if bounds.text is not None:
            yield _text(f"{name}.text", row, observer, bounds.text, needs)
        if bounds.weight_share is not None:
            yield _share(f"{name}.weight_share", row, observer, bounds.weight_share)
        if bounds.weight_cosine is not None:
            yield _weights(f"{name}.weight_cosine", row, observer, bounds.weight_cosine, needs)
    yield from _resources(needs, row)


def _compare(
    need: str, row: Row, found: Estimate, bound: float, needs: Needs, *, at_least: bool, what: str = ""
) -> Check:
    """An estimate against a bound: by its value, or by the end of its interval that is the worse one."""
    interval = needs.confidence == "interval"
    end = found.low if at_least else found.high
    if interval and end is None:
        return _unknown(need, row, bound, f"{what}{found.value:.3f} was measured without an interval")
    measured = found.value if end is None or not interval else end
    is_met = measured >= bound if at_least else measured <= bound
    ends = "" if found.low is None or found.high is None else f" [{found.low:.3f}, {found.high:.3f}]"
    verb = "keeps" if is_met else "breaks"
    wanted = f"at {'least' if at_least else 'most'} {bound:g}"
    whole = "the whole interval" if interval else "the figure"
    reason = f"{what}{found.value:.3f}{ends}, {whole} {verb} {wanted}"
    return Check(need, row.task, measured, bound, is_met, "interval" if interval else "point", reason)


def _unknown(need: str, row: Row, bound: float | bool, why: str) -> Check:
    return Check(need, row.task, None, bound, is_met=False, by="nothing", reason=f"no record: {why}")


def _by_design(need: str, row: Row, measured: float, bound: float, why: str) -> Check:
    return Check(need, row.task, measured, bound, measured <= bound, "design", why)


def _loss(needs: Needs, row: Row, bound: float) -> Check:
    need = "utility.largest_loss"
    if row.difference is None:
        return _by_design(need, row, 0.0, bound, "it is an unprotected baseline itself")
    if isinstance(row.difference, Absent):
        return _unknown(need, row, bound, str(row.difference))
    found = _compare(need, row, row.difference, -bound, needs, at_least=True, what="difference ")
    return Check(need, row.task, found.measured, bound, found.is_met, found.by, found.reason)


def _text(need: str, row: Row, observer: Observer, bound: float, needs: Needs) -> Check:
    if observer in row.facts.clear_to:
        return _by_design(need, row, 1.0, bound, f"the {observer} gets the text as it is")
    stated = needs.observer[observer]
    phases = stated.phases or (None,)
    checks = [_text_of(need, row, observer, bound, needs, phase) for phase in phases]
    return next((check for check in checks if not check.is_met), checks[0])


def _text_of(need: str, row: Row, observer: Observer, bound: float, needs: Needs, phase: Phase | None) -> Check:
    """The same of one phase's texts, or of all that were measured."""
    mine = [attack for attack in row.attacks if attack.observer == observer]
    if observer not in row.facts.observers and not any(who.observer == observer for who in row.worst):
        return _by_design(need, row, 0.0, bound, f"the {observer} gets no message that depends on the text")
    asked = {who: worst for who, worst in row.worst.items() if _is_asked(who, observer, needs, phase)}
    measured = [
        (attack, attack.figures[attack.text_metric].estimate)
        for attack in mine
        if attack.text_metric and attack.attacker in asked
    ]
    texts = f" of {told_phase(phase)}" if phase else ""
    if measured:
        strongest, found = max(measured, key=lambda item: _upper(item[1], needs))
        what = f"{strongest.label}{texts}, knowing {told_knows(strongest.knows)}, gets {strongest.text_metric} "
        return _compare(need, row, found, bound, needs, at_least=False, what=what)
    absent = [worst for worst in asked.values() if isinstance(worst, Absent)]
    counted = [worst for worst in asked.values() if isinstance(worst, Uncrossed)]
    if counted and not absent:
        return Check(need, row.task, 0.0, bound, is_met=True, by="transcript", reason=f"{counted[0]}{texts}")
    why = str(absent[0]) if absent else f"no attack of this observer reconstructs text{texts} with that knowledge"
    return _unknown(need, row, bound, why)


def _is_asked(who: Attacker, observer: Observer, needs: Needs, phase: Phase | None) -> bool:
    knows = needs.observer[observer].knows
    return who.observer == observer and within(who.knows, knows) and phase in {None, who.phase}


def _upper(found: Estimate, needs: Needs) -> float:
    return found.bounds[1] if needs.confidence == "interval" else found.value


def _kinds(row: Row, observer: Observer) -> frozenset[str]:
    design = DESIGNS.get(row.design)
    return WEIGHTS if design is None else WEIGHTS & frozenset(design.reveals.get(observer, ()))


def _share(need: str, row: Row, observer: Observer, bound: float) -> Check:
    if not _kinds(row, observer):
        return _by_design(need, row, 0.0, bound, f"the {observer} gets no weights")
    share = None if isinstance(row.cost, Absent) else row.cost.revealed.get(observer)
    return _figure(need, row, share, bound, "of the parameters are in the clear")


def _weights(need: str, row: Row, observer: Observer, bound: float, needs: Needs) -> Check:
    kinds = _kinds(row, observer)
    if not kinds:
        return _by_design(need, row, 0.0, bound, f"the {observer} gets no weights")
    if kinds & WEIGHTS_CLEAR:
        return _by_design(need, row, 1.0, bound, f"the {observer} gets weights as they are")
    stated = needs.observer[observer].knows
    tried = [w for who, w in row.worst_weights.items() if who.observer == observer and within(who.knows, stated)]
    if not tried:
        return _unknown(need, row, bound, "no attack on the weights" + (" with that knowledge" if stated else ""))
    worst = max(tried, key=lambda each: _upper(each.figure.estimate, needs))
    what = f"{worst.by.label}, knowing {told_knows(worst.by.knows)}, gets {worst.metric} "
    return _compare(need, row, worst.figure.estimate, bound, needs, at_least=False, what=what)


def _figure(need: str, row: Row, measured: float | None, bound: float, what: str) -> Check:
    """A figure that has no interval."""
    if measured is None:
        return _unknown(need, row, bound, "it was not measured")
    is_met = measured <= bound
    verb = "keeps" if is_met else "breaks"
    return Check(
        need, row.task, measured, bound, is_met, "figure", f"{measured:,.4g} {what}, {verb} at most {bound:,.4g}"
    )


def _resources(needs: Needs, row: Row) -> Iterator[Check]:
    cost = None if isinstance(row.cost, Absent) else row.cost
    stated = needs.resources
    line = 0 if cost is None else sum(n for pair, n in cost.link_bytes.items() if "owner" in pair.split("->"))
    seconds = None if cost is None or cost.seconds_per_step is None else cost.seconds_per_step.p90
    asked = (
        (
            "owner_memory_bytes",
            None if cost is None else cost.owner_peak,
            stated.owner_memory_bytes,
            "bytes at the owner",
        ),
        ("bytes_per_step", None if cost is None else cost.bytes_per_step, stated.bytes_per_step, "bytes a step"),
        ("seconds_per_step", seconds, stated.seconds_per_step, "s a step (90th percentile)"),
        ("transfer_seconds", line or None, stated.owner_transfer_bytes, "bytes over the owner's line"),
    )
    for name, measured, bound, what in asked:
        if bound is not None:
            yield _figure(f"resources.{name}", row, measured, bound, what)


def enclave_check(needs: Needs, row: Row) -> Check:
    """Whether there is the hardware that the design is built on."""
    available = needs.resources.tee
    is_met = available or not row.facts.needs_enclave
    why = "no enclave is part of it" if not row.facts.needs_enclave else "it needs an enclave"
    return Check("resources.tee", None, None, available, is_met, "design", why)
