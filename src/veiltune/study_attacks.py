"""Attacks among a comparison's records: who made them, and the strongest of each attacker.

What records of an earlier version do not say is told by the attack's name and the design's table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from veiltune.results import RunResult
from veiltune.study_records import AttackCell, RunCell
from veiltune.study_rows import STATE_METRIC, WEIGHT_METRIC, Attacker, AttackRow, DesignFacts, Uncrossed, Worst
from veiltune.study_terms import ALL_KNOWS, ALL_PHASES, Knows, Phase, in_order
from veiltune.study_values import Absent, controlled

_UNCOUNTED = Absent("missing", "by the design's table no state crosses while tuning; it was not counted here")
_RETURNED = "no state crossed, but {} message(s) with layers tuned on the text did; no attack on those was made"
RESULTS = frozenset({"AdapterTensors", "PlugIn"})
"""Kinds of message with what was tuned on the text: sent only where that was agreed on, so runs tell, not tables."""
_Heading = tuple[str, str, str, str, Knows | None, Phase | None]


@lru_cache
def design_facts(name: str) -> DesignFacts:
    """Facts of a design by its name; of an unknown one (a record of another version), none."""
    from veiltune.designs import DESIGNS

    design = DESIGNS.get(name)
    if design is None:
        return DesignFacts()
    others = {who: kinds for who, kinds in design.reveals.items() if who != "owner" and who not in design.enclaves}
    clear = {who for who, kinds in others.items() if "TrainBatch" in kinds and kinds["TrainBatch"].form == "clear"}
    seen = [
        who
        for who, kinds in others.items()
        if any(each.form in {"clear", "masked"} for kind, each in kinds.items() if kind not in RESULTS)
    ]
    return DesignFacts(
        observers=tuple(seen),
        clear_to=tuple(who for who in others if who in clear),
        trained=design.baseline.get("layers", "all"),
        needs_enclave=bool(design.enclaves),
        tunes_apart=design.tunes_apart,
    )


def knows_of(attack: str, recorded: Knows | None = None) -> Knows | None:
    """What an attack takes: as recorded, else by its name; ``None`` of an unknown one."""
    from veiltune.attacks import ATTACKS

    return recorded or (ATTACKS[attack].knows if attack in ATTACKS else None)


def phase_of(attack: str, design: str, recorded: Phase | None = None) -> Phase | None:
    """Whose texts an attack was after: as recorded, else what it found then, the texts tuned on unless none of them cross."""
    from veiltune.attacks import ATTACKS

    if recorded is not None or (attack in ATTACKS and not ATTACKS[attack].of_texts):
        return recorded
    return "questions" if design_facts(design).tunes_apart else "tuning"


def why_absent(bad: Sequence[RunCell | AttackCell]) -> Absent:
    """Why there is no figure, told by the first of the cells that have none."""
    if not bad:
        return Absent("missing")
    first = bad[0]
    if first.status == "withheld":
        return Absent("withheld", first.error or "control failed")
    return Absent("failed", first.error or "no reason recorded")


def notes_of(cells: Sequence[RunCell | AttackCell], seeds: Sequence[int]) -> tuple[str, ...]:
    """What befell seeds that gave no figure, where others did."""
    notes = [f"seed {cell.seed} {cell.status}: {cell.error}" for cell in cells if cell.status != "ok"]
    missing = sorted(set(seeds) - {cell.seed for cell in cells})
    return (*notes, *(f"seed {seed} missing" for seed in missing))


def _heading_of(cell: AttackCell) -> _Heading:
    known, phase = knows_of(cell.attack, cell.knows), phase_of(cell.attack, cell.design, cell.phase)
    return cell.attack, cell.attack_setting, cell.moment, cell.observer, known, phase


def attack_rows(
    here: Sequence[AttackCell], attacks: Sequence[AttackCell], no_run: Absent | None
) -> tuple[AttackRow, ...]:
    """Every attack that was tried on a design anywhere, with what it came to in one row.

    Args:
        here: attacks of the row.
        attacks: on the design in any setting and on any task.
        no_run: why there was nothing to attack; ``None``: there was.
    """
    seeds = sorted({each.seed for each in attacks})
    rows: list[AttackRow] = []
    for heading in dict.fromkeys(map(_heading_of, attacks)):
        cells = [cell for cell in here if _heading_of(cell) == heading]
        counted = [cell.nothing for cell in cells if cell.status == "ok" and cell.nothing is not None]
        nothing = max(counted, key=lambda each: (each.returned, each.passes), default=None)
        done = [cell for cell in cells if cell.status == "ok" and cell.figures]
        names = dict.fromkeys(name for cell in done for name in cell.figures)
        rows.append(
            AttackRow(
                *heading,
                figures={name: controlled([c.figures[name] for c in done if name in c.figures]) for name in names},
                absent=None if done or nothing else (no_run if no_run and not cells else why_absent(cells)),
                nothing=None if done else nothing,
                notes=notes_of(cells, seeds) if done else (),
                samples=next((tuple(cell.samples) for cell in done if cell.samples), ()),
            )
        )
    return tuple(rows)


def worst_by_attacker(
    rows: Sequence[AttackRow], facts: DesignFacts, returned: Mapping[str, int], otherwise: Absent
) -> dict[Attacker, Worst | Uncrossed | Absent]:
    """The strongest text reconstruction by each attacker; where nothing was measured, why, if only ``otherwise``.

    Args:
        rows: of attacks.
        facts: of the design.
        returned: messages with what was tuned, by who got them (`results_sent`).
        otherwise: said of observers of whom nothing is known.
    """
    found: dict[Attacker, Worst | Uncrossed | Absent] = {}
    for observer in dict.fromkeys([*facts.observers, *(row.observer for row in rows)]):
        if observer in facts.clear_to:
            continue
        mine = [row for row in rows if row.observer == observer]
        by_attacker = {who: _worst_of([row for row in mine if row.attacker == who]) for who in _attackers(mine)}
        known = {who: worst for who, worst in by_attacker.items() if worst is not None}
        if not known and (observer in facts.observers or not mine):
            known = {Attacker(observer, None, None): otherwise}
        elif facts.tunes_apart and observer in facts.observers and not any(who.phase == "tuning" for who in known):
            known = {Attacker(observer, "tuning", "nothing"): _UNCOUNTED, **known}
        found |= known
    for observer, count in returned.items():
        if observer not in {*facts.clear_to, *(who.observer for who in found)}:
            found[Attacker(observer, "tuning", "nothing")] = Absent("missing", _RETURNED.format(count))
    return found


def results_sent(results: Sequence[RunResult]) -> dict[str, int]:
    """Messages with what was tuned on the text, by who got them beside the owner and enclaves; of several runs the most."""
    sent: dict[str, int] = {}
    for result in results:
        for pair, kinds in result.cost.messages.items():
            receiver = pair.partition("->")[2]
            count = sum(number for kind, number in kinds.items() if kind in RESULTS)
            if count and receiver in {"provider", "host"}:
                sent[receiver] = max(count, sent.get(receiver, 0))
    return sent


def _attackers(rows: Sequence[AttackRow]) -> list[Attacker]:
    """In the order of the vocabularies."""
    phases = in_order((row.phase for row in rows), ALL_PHASES)
    knows = in_order((row.knows for row in rows), ALL_KNOWS)
    there = {row.attacker for row in rows}
    who = (Attacker(row.observer, phase, each) for row in rows[:1] for phase in phases for each in knows)
    return [each for each in who if each in there]


def _worst_of(rows: Sequence[AttackRow]) -> Worst | Uncrossed | Absent | None:
    """The strongest of one attacker's; ``None`` where its attacks have figures, and none of a text."""
    text = [Worst(row, row.text_metric) for row in rows if row.text_metric]
    states = [Worst(row, STATE_METRIC) for row in rows if STATE_METRIC in row.figures]
    strongest = _strongest(text or states)
    if strongest is not None:
        return strongest
    counted = next((row.nothing for row in rows if row.nothing is not None), None)
    if counted is not None:
        return Absent("missing", _RETURNED.format(counted.returned)) if counted.returned else Uncrossed(counted)
    return next((row.absent for row in rows if row.absent), None)


def worst_weights(rows: Sequence[AttackRow]) -> dict[Attacker, Worst]:
    """The strongest recovery of weights by each attacker."""
    found: dict[Attacker, Worst] = {}
    for row in rows:
        if WEIGHT_METRIC in row.figures:
            who = row.attacker
            both = [found[who]] if who in found else []
            found[who] = max([*both, Worst(row, WEIGHT_METRIC)], key=lambda each: each.figure.estimate.value)
    return found


def _strongest(found: Sequence[Worst]) -> Worst | None:
    return max(found, key=lambda each: each.figure.estimate.value, default=None)
