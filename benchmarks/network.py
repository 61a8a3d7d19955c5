"""Seconds of a step and of a generated token where two parties are on two machines, by rate and delay of the link.

SmolLM2-135M-Instruct, float32, LoRA rank 16, steps of 4 x 128 tokens (and of 1 x 32 and 1 x 128 over one link), answers of 8
tokens after a prompt of 64, whose pass counts with them. All processes are on this machine; a relay holds back what passes
between enclave and host, or between owner and provider where the model is cut (`benchmarks._link`): rate and delay, not TCP's
caution. Sessions stay open over all links, and take turns within each; those of designs that cut the model after those with an
enclave. Both parties compute on this machine's two cores: on an accelerator less of a step is arithmetic, and more is the link.

``link_seconds`` is computed, not measured: a step's bytes at that rate, and its messages' delays if none overlaps. Where it is
longer than a minute, the step is left out and that is all that its row has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks._cells import cell
from benchmarks._link import probe, shaped
from benchmarks._pace import UNHINDERED, Shape
from benchmarks._record import Row, alternate, ratios, run, summary
from benchmarks._runs import SMOLLM2, live
from benchmarks._steps import CASES, LORA, answer, cut_step, opened, protected_step, random_ids, tables_for
from benchmarks.step_ratio import CUT_SETTINGS
from veiltune.parties.owner import Owner

BATCH, LENGTH, PROMPT, NEW = 4, 128, 64, 8
SETTINGS = ("compact", "paper", "veil", "veil, optimiser on the host")
SMALL = ((1, 32), (1, 128))
SMALL_SETTINGS = ("compact", "veil", "veil, optimiser on the host")
LONGEST_SECONDS = 60.0

Step = Callable[[], None]
Count = dict[str, float]


@dataclass(frozen=True)
class Link:
    """A network between two parties.

    Attributes:
        bits_per_second: each way.
        delay_seconds: each way.
        rounds: how often a step is timed over it.
        warmup: how often an answer is given before it is timed.
    """

    bits_per_second: float
    delay_seconds: float
    rounds: int
    warmup: int = 1

    @property
    def name(self) -> str:
        """For people."""
        rate, unit = (
            (self.bits_per_second / 1e9, "G") if self.bits_per_second >= 1e9 else (self.bits_per_second / 1e6, "M")
        )
        return f"{rate:g} {unit}bit/s, {1e3 * self.delay_seconds:g} ms"

    def seconds(self, count: Count) -> float:
        """What so many messages and bytes take, one after another."""
        return 8 * count["bytes"] / self.bits_per_second + count["messages"] * self.delay_seconds


GIGABIT = Link(1e9, 1e-3, 4)
LINKS = (Link(10e9, 1e-4, 4), GIGABIT, Link(100e6, 10e-3, 2, warmup=0), Link(1e9, 20e-3, 2, warmup=0))
"""The same rack, the same site, another site over a thin line, another region."""
QUICK_LINKS = (Link(10e9, 1e-4, 2), Link(1e9, 2e-3, 2, warmup=0))


@dataclass
class Session:
    """What is open of a setting.

    Attributes:
        design: its name.
        owner: of the session.
        step: of 4 x 128 tokens.
        steps_done: how many, of any shape.
    """

    design: str
    owner: Owner
    step: Step
    steps_done: int = 0

    def counted(self, step: Step) -> Step:
        """The same step; this session keeps count."""

        def one() -> None:
            step()
            self.steps_done += 1

        return one

    def totals(self) -> Count:
        """Messages and bytes of all steps so far."""
        figures = self.owner.tuner.figures()
        names = {"messages": "crossings_per_step", "bytes": "border_bytes_per_step"}
        sums = {name: round(self.steps_done * figures[key]) for name, key in names.items()}
        return {**sums, "steps": self.steps_done}


def _timed(
    sessions: dict[str, Session], steps: dict[str, Step], link: Link
) -> tuple[dict[str, list[float]], dict[str, Count]]:
    """Steps by turns, after one that is neither timed nor counted: seconds, and messages and bytes of one."""
    counted = {setting: sessions[setting].counted(step) for setting, step in steps.items()}
    for step in counted.values():
        step()
    before = {setting: sessions[setting].totals() for setting in steps}
    times = alternate(counted, link.rounds, warmup=0)
    counts: dict[str, Count] = {}
    for setting, then in before.items():
        now = sessions[setting].totals()
        count = now["steps"] - then["steps"]
        counts[setting] = {name: (now[name] - then[name]) / count for name in ("messages", "bytes")}
    return times, counts


def _row(link: Link, measured: Count, batch: int, length: int, setting: str, session: Session, count: Count) -> Row:
    """What every row says."""
    return {
        "link": link.name,
        "rate_bits_per_second": link.bits_per_second,
        "delay_seconds": link.delay_seconds,
        **measured,
        "design": session.design,
        "setting": setting,
        "batch": batch,
        "length": length,
        "crossings_per_step": count["messages"],
        "border_bytes_per_step": count["bytes"],
        "link_seconds": link.seconds(count),
    }


def _over(sessions: dict[str, Session], link: Link, shape: Shape, prompt: Tensor, known: dict[str, Count]) -> list[Row]:
    """All settings over one link, at 4 x 128 tokens; ``known``: what a step sends, from links before this one."""
    shape.set(link.bits_per_second, link.delay_seconds)
    measured = probe(shape)
    too_long = {name for name, count in known.items() if link.seconds(count) > LONGEST_SECONDS}
    used = {name: each for name, each in sessions.items() if name not in too_long}
    step_times, counts = _timed(sessions, {name: each.step for name, each in used.items()}, link)
    known.update(counts)
    answers = {name: partial(answer, each.owner, prompt, NEW) for name, each in used.items()}
    token_times = alternate(answers, link.rounds, warmup=link.warmup)
    both = {"step": step_times, "generation": token_times}
    to_compact = {what: ratios(times, "compact") if "compact" in times else {} for what, times in both.items()}
    rows: list[Row] = []
    for name, each in sessions.items():
        row = _row(link, measured, BATCH, LENGTH, name, each, known[name])
        if name in too_long:
            rows.append({**row, "left_out": f"the link alone would take over {LONGEST_SECONDS:g} s a step (computed)"})
            continue
        row["step_seconds"] = summary(step_times[name])
        row["token_seconds"] = summary([seconds / NEW for seconds in token_times[name]])
        rows.append(row | {f"{what}_ratio_to_compact": found.get(name) for what, found in to_compact.items()})
    return rows


def _small(
    sessions: dict[str, Session], link: Link, shape: Shape, model: str, shapes: Sequence[tuple[int, int]]
) -> list[Row]:
    """Steps of fewer tokens over one link."""
    shape.set(link.bits_per_second, link.delay_seconds)
    measured = probe(shape)
    rows: list[Row] = []
    for batch, length in shapes:
        ids = random_ids(model, batch, length)
        steps = {name: protected_step(sessions[name].owner, ids) for name in SMALL_SETTINGS if name in sessions}
        times, counts = _timed(sessions, steps, link)
        to_compact = ratios(times, "compact")
        for name in steps:
            row = _row(link, measured, batch, length, name, sessions[name], counts[name])
            rows.append({**row, "step_seconds": summary(times[name]), "step_ratio_to_compact": to_compact.get(name)})
    return rows


def _enclaves(
    model: str, settings: Sequence[str], links: Sequence[Link], small: Sequence[tuple[int, int]]
) -> list[Row]:
    """Designs with an enclave: the link is the one between enclave and host."""
    shape, ids, prompt = Shape.create(*UNHINDERED), random_ids(model, BATCH, LENGTH), random_ids(model, 1, PROMPT)
    known: dict[str, Count] = {}
    rows: list[Row] = []
    with shaped(shape), opened(settings, model, **tables_for(BATCH, LENGTH)) as owners:
        sessions = {name: Session(CASES[name][0], owner, protected_step(owner, ids)) for name, owner in owners.items()}
        for link in links:
            rows += _over(sessions, link, shape, prompt, known)
        rows += _small(sessions, GIGABIT, shape, model, small)
        shape.set(*UNHINDERED)
    shape.close()
    return rows


def _cuts(model: str, settings: Sequence[str], links: Sequence[Link]) -> list[Row]:
    """Designs that cut the model: the link is the one between owner, which is this process, and provider."""
    shape, ids, prompt = Shape.create(*UNHINDERED), random_ids(model, BATCH, LENGTH), random_ids(model, 1, PROMPT)
    known: dict[str, Count] = {}
    rows: list[Row] = []
    with ExitStack() as stack:
        stack.enter_context(shaped(shape))
        sessions: dict[str, Session] = {}
        for name in settings:
            design, options = CUT_SETTINGS[name]
            tables: dict[str, Any] = {**tables_for(BATCH, LENGTH), design: options}
            owner = stack.enter_context(live(design, model, lora=LORA, **tables))
            sessions[name] = Session(design, owner, cut_step(owner, ids, is_new=name == "first epoch"))
        for link in links:
            rows += _over(sessions, link, shape, prompt, known)
        shape.set(*UNHINDERED)
    shape.close()
    return rows


def measure(quick: bool) -> list[Row]:
    """One row a link, setting and shape of a step."""
    if quick:
        tiny = "random:llama:6,64,4,500"
        return _enclaves(tiny, ("compact", "veil"), QUICK_LINKS, SMALL[:1]) + _cuts(tiny, ("32 bits",), QUICK_LINKS)
    said = {"links": [asdict(link) for link in LINKS], "new": NEW}
    enclaves = {**said, "settings": SETTINGS, "small": SMALL}
    rows = cell("network", enclaves, lambda: _enclaves(SMOLLM2, SETTINGS, LINKS, SMALL))
    cut = {**said, "settings": tuple(CUT_SETTINGS)}
    return rows + cell("network", cut, lambda: _cuts(SMOLLM2, tuple(CUT_SETTINGS), LINKS))


if __name__ == "__main__":
    run("network", __doc__, measure)
