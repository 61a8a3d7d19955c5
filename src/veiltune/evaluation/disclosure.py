"""What one finished run revealed, observer by observer: from the design's table and the run's own record.

A message's meaning is told once, by the design that sends it (`Design.reveals`); what a message *is*, by its own docstring. Here
both are laid beside what was counted and what attacks measured. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.filesize import decimal
from rich.text import Text

from veiltune.designs import DESIGNS
from veiltune.errors import UserError, nearest
from veiltune.evaluation.inspection import observers_of
from veiltune.results import RunResult
from veiltune.study_summary import knows_of
from veiltune.study_terms import PHASES, told_knows, told_phase
from veiltune.transport.messages import MESSAGES

NETWORK = "network"
NETWORK_SEES = (
    "parties that are processes of one machine have no network between them",
    "links between machines are not encrypted: who is on the path reads all that these messages hold",
)


@dataclass(frozen=True)
class Received:
    """One kind of message that an observer got.

    Attributes:
        sender: of whom.
        kind: of message.
        form: public, clear, masked or control; see `designs.base.Form`.
        what: what it tells.
        messages: how many; None if the record does not say.
        num_bytes: whole frames.
    """

    sender: str
    kind: str
    form: str
    what: str
    messages: int | None
    num_bytes: int


@dataclass(frozen=True)
class Disclosure:
    """What one observer had of a run.

    Attributes:
        observer: who.
        received: what it got, the most telling form first.
        besides: what it learns that is no message.
        revealed_param_share: of the model's parameters in the clear; None: not counted.
        attacks: figures of attacks on what it saw, by attack and metric.
    """

    observer: str
    received: tuple[Received, ...]
    besides: tuple[str, ...]
    revealed_param_share: float | None
    attacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_ORDER = ("clear", "masked", "public", "control")


def disclosures(result: RunResult) -> list[Disclosure]:
    """What every party of a run saw, and a network between them.

    Raises:
        UserError: the record is of a design that this version does not know.
    """
    if result.design not in DESIGNS:
        raise UserError(f"the run is of an unknown design {result.design!r}", hint=nearest(result.design, DESIGNS))
    design = DESIGNS[result.design]
    found = [
        Disclosure(
            who,
            _received(result, who),
            tuple(design.also_sees.get(who, ())),
            result.cost.revealed_param_share.get(who),
            _attacks(result, who),
        )
        for who in observers_of(result.design)
    ]
    return [*found, Disclosure(NETWORK, _crossing(result), NETWORK_SEES, None)]


def _received(result: RunResult, observer: str) -> tuple[Received, ...]:
    """Messages to one observer; of a kind its design does not list (another version's), that it is not listed."""
    reveals = DESIGNS[result.design].reveals[observer]
    found: list[Received] = []
    for pair, kinds in result.cost.bytes.items():
        sender, receiver = pair.split("->")
        counts = result.cost.messages.get(pair, {})
        for kind, size in kinds.items() if receiver == observer else ():
            reveal = reveals.get(kind)
            form, what = ("clear", "not in the design's table") if reveal is None else (reveal.form, reveal.what)
            found.append(Received(sender, kind, form, what, counts.get(kind), size))
    return tuple(sorted(found, key=lambda each: (_ORDER.index(each.form), -each.num_bytes)))


def _crossing(result: RunResult) -> tuple[Received, ...]:
    """Every kind that crossed any link, by what the message itself is."""
    sizes: dict[str, list[int]] = {}
    for pair, kinds in result.cost.bytes.items():
        for kind, size in kinds.items():
            total = sizes.setdefault(kind, [0, 0])
            total[0] += result.cost.messages.get(pair, {}).get(kind, 0)
            total[1] += size
    found = [Received("any", kind, "clear", told(kind), n or None, size) for kind, (n, size) in sizes.items()]
    return tuple(sorted(found, key=lambda each: -each.num_bytes))


def told(kind: str) -> str:
    """What a kind of message is: the first line of its own description."""
    described = MESSAGES[kind].__doc__ if kind in MESSAGES else None
    return (described or "of another version").strip().splitlines()[0]


def _attacks(result: RunResult, observer: str) -> dict[str, dict[str, Any]]:
    """Figures of attacks on one observer's view."""
    return {
        name: mine
        for name, metrics in result.privacy.items()
        if (mine := {metric: each for metric, each in metrics.items() if each.get("observer") == observer})
    }


def as_json(result: RunResult) -> dict[str, Any]:
    """The statement as plain values."""
    return {
        "design": result.design,
        "model": result.model,
        "simulated_enclave": result.simulated_enclave,
        "public_ancestors": result.labels.public_ancestors,
        "observers": [asdict(each) for each in disclosures(result)],
    }


def statement(result: RunResult) -> Text:
    """The same for people."""
    text = Text()
    text.append(f"{result.design} on {result.model}: what this run revealed\n", style="bold")
    if result.simulated_enclave:
        text.append("SIMULATED ENCLAVE: whoever owned its machine could read all that it held\n", style="bold red")
    for ancestor, verdict in result.labels.public_ancestors.items():
        text.append(f"public ancestor {ancestor}: {verdict}\n", style="bold red" if verdict == "aligned" else "")
    for each in disclosures(result):
        text.append(f"\nthe {each.observer} had\n", style="bold")
        for got in each.received:
            count = "" if got.messages is None else f"{got.messages:,} x "
            origin = "" if each.observer == NETWORK else f" from the {got.sender}"
            what = got.what if each.observer == NETWORK else f"{got.form}: {got.what}"
            text.append(f"  - {count}{got.kind}{origin}, {decimal(got.num_bytes)}; {what}\n")
        if not each.received:
            text.append("  - no message\n")
        text.append("".join(f"  - besides: {line}\n" for line in each.besides))
        text.append("".join(f"  - {line}\n" for line in _figures(each)))
    return text


def _figures(each: Disclosure) -> list[str]:
    if each.observer == NETWORK:
        return []
    share = each.revealed_param_share
    shown = "not counted" if share is None else f"{100 * share:.1f}%"
    lines = [f"parameters in the clear: {shown}"]
    for name, metrics in each.attacks.items():
        lines += [_figure(name, metric, found) for metric, found in metrics.items()]
    return lines if each.attacks else [*lines, "no attack on what it saw was measured in this run"]


def _figure(name: str, metric: str, found: Mapping[str, Any]) -> str:
    """One figure of an attack; of a phase of which nothing crossed, that."""
    phase = found.get("phase")
    if "leaky_control" not in found:
        others = f"{found['value']:.0f} of {found['value'] + found['n']:.0f} recorded passes are of them"
        returned = (
            f"; {found['returned']} message(s) with layers tuned on them were returned" if found["returned"] else ""
        )
        return f"nothing crossed of {PHASES[phase] if phase else 'these texts'}: {others}{returned}"
    ends = "" if found.get("ci95") is None else f" [{found['ci95'][0]:.3f}, {found['ci95'][1]:.3f}]"
    who = knows_of(name.partition("[")[0], found.get("knows"))
    told = f"{told_phase(phase)}; " if phase else ""
    controls = f"leaky {found['leaky_control']:.3f}, shuffled {found['shuffled_control']:.3f}"
    return f"attack {name}: {metric} {found['value']:.3f}{ends} ({told}knows besides: {told_knows(who)}; {controls})"
