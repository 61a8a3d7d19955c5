"""Values of a comparison in words: how a figure, an interval, a cost and a status are written."""

from __future__ import annotations

import math

from veiltune.report.comparison import SIMULATED, bytes_text, percent, spread_text
from veiltune.report.studies.grid import Cell
from veiltune.study_rows import Attacker, AttackRow, CostSummary, Exposure, Row, Uncrossed, Worst
from veiltune.study_terms import told_knows, told_phase
from veiltune.study_values import Absent, Estimate

MINUS = "−"


def figure(value: float) -> str:
    """A share with three digits, with a true minus sign; what is no number says so."""
    if not math.isfinite(value):
        return "not a number (diverged)" if math.isnan(value) else "infinite (diverged)"
    return f"{value:.3f}".replace("-", MINUS)


def interval(estimate: Estimate) -> str:
    """The 95% interval."""
    if estimate.low is None or estimate.high is None:
        return "none"
    return f"{figure(estimate.low)} to {figure(estimate.high)}"


def estimated(estimate: Estimate) -> str:
    """A figure with its interval."""
    if estimate.low is None:
        return figure(estimate.value)
    return f"{figure(estimate.value)} [{interval(estimate)}]"


def signed(estimate: Estimate) -> str:
    """A difference with its interval."""
    sign = "+" if estimate.value > 0 else ""
    return sign + estimated(estimate)


def estimate_cell(value: Estimate | Absent | None) -> Cell | Absent | None:
    """A figure with its interval, or why there is none."""
    return Cell(estimated(value)) if isinstance(value, Estimate) else value


def difference_cell(row: Row) -> Cell | Absent:
    """The difference to the unprotected baseline; an unprotected row says that it is one."""
    if row.difference is None:
        return Cell("unprotected")
    return row.difference if isinstance(row.difference, Absent) else Cell(signed(row.difference))


def _worst_lines(who: Attacker, worst: Worst | Uncrossed | Absent) -> list[str]:
    """An attacker's strongest reconstruction. Of why there is none the beginning: the table of attacks has the whole."""
    if isinstance(worst, Uncrossed):
        return [str(worst)]
    known = [f"knows {told_knows(who.knows)}"] if who.knows else []
    if isinstance(worst, Absent):
        return [f"{worst.status}{': ' * bool(worst.reason)}{worst.reason.partition(':')[0]}", *known]
    return [f"{worst.metric} {estimated(worst.figure.estimate)}", ", ".join([f"by {worst.by.label}", *known])]


def exposures_cell(row: Row) -> Cell | Absent:
    """What every observer could read of each kind of texts, below a line that says so and ends with a colon."""
    if row.facts.clear_to and not row.worst:
        return Cell(f"{', '.join(row.facts.clear_to)}: the text itself (by design, not attacked)", "loud")
    if not row.worst:
        return Absent("missing", "no attack")
    kind = "absent" if all(isinstance(each, Absent) for each in row.worst.values()) else ""
    groups: dict[str, list[str]] = {}
    for who, worst in row.worst.items():
        heading = ", ".join(part for part in (who.observer, told_phase(who.phase)) if part)
        groups.setdefault(f"{heading}:", []).extend(_worst_lines(who, worst))
    return Cell("\n".join(line for heading, lines in groups.items() for line in (heading, *lines)), kind)


def exposure_text(exposure: Exposure | Absent) -> str:
    """The strongest reconstruction in a phrase, for alternative texts."""
    if isinstance(exposure, Absent):
        return str(exposure)
    if exposure.by_design:
        return f"the {exposure.observer} has the text by design"
    if exposure.uncrossed is not None:
        return f"the {exposure.observer}: {exposure.uncrossed}"
    return f"reconstruction {estimated(exposure.estimate)} by the {exposure.observer}"


def hardware_cell(row: Row) -> Cell:
    """Whether trusted hardware is part of the design, and whether it was there."""
    if not row.facts.needs_enclave:
        return Cell(f"none\n{SIMULATED}", "loud") if row.simulated else Cell("none")
    return Cell(f"TEE at the host\n{SIMULATED}", "loud") if row.simulated else Cell("TEE at the host")


def status_cell(row: Row | AttackRow) -> Cell:
    """Whether the cell was measured, and what befell single seeds."""
    if row.absent is not None:
        return Cell(str(row.absent), "absent")
    if isinstance(row, AttackRow) and row.nothing is not None:
        return Cell("counted")
    seeds = f"ok, {len(row.seeds)} seed{'s' * (len(row.seeds) != 1)}" if isinstance(row, Row) else "ok"
    return Cell("\n".join([seeds, *row.notes]))


def revealed_text(cost: CostSummary) -> str | None:
    """Shares of the model's parameters in the clear, by observer."""
    return "\n".join(f"{who} {percent(share)}" for who, share in cost.revealed.items()) or None


def memory_text(cost: CostSummary) -> str | None:
    """Peaks of the owner's process and of all together."""
    if cost.whole_peak is None:
        return None
    whole = bytes_text(cost.whole_peak)
    return f"all in one process {whole}" if cost.owner_peak is None else f"{bytes_text(cost.owner_peak)} / {whole}"


def cost_text(cost: CostSummary) -> str:
    """Bytes, seconds and memory, each in its line; what no record holds is missing."""
    moved, seconds, memory = bytes_text(cost.bytes_per_step), seconds_text(cost), memory_text(cost)
    return "\n".join(
        (
            f"{moved} a step" if moved else "bytes missing",
            f"{seconds} s a step" if seconds else "seconds missing",
            memory or "memory missing",
        )
    )


def seconds_text(cost: CostSummary) -> str | None:
    """Seconds of an optimiser step: median, 10th to 90th percentile."""
    return spread_text(cost.seconds_per_step)
