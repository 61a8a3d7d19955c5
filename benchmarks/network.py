"""Seconds of a step and of a generated token where enclave and host are on two machines, by rate and delay of the link.

SmolLM2-135M-Instruct, float32, LoRA rank 16, steps of 4 x 128 tokens, answers of 16 tokens after a prompt of 64. All processes
are on this machine; a relay holds back what passes between enclave and host (`benchmarks._link`). Settings take turns within a
link. The host computes on this machine's two cores: on an accelerator less of a step is arithmetic, and more is the link.
"""

from __future__ import annotations

from functools import partial

from benchmarks._cells import cell
from benchmarks._link import shaped
from benchmarks._record import Row, alternate, ratios, run, summary
from benchmarks._runs import SMOLLM2
from benchmarks._steps import CASES, answer, opened, protected_step, random_ids, tables_for

BATCH, LENGTH, PROMPT, NEW = 4, 128, 64, 16
LINKS = {"1 Gbit/s, 1 ms": (1e9, 1e-3)}
SETTINGS = ("compact", "paper", "veil", "veil, optimiser on the host")
ROUNDS = 4


def _link(name: str, model: str, settings: tuple[str, ...], rounds: int) -> list[Row]:
    ids, prompt = random_ids(model, BATCH, LENGTH), random_ids(model, 1, PROMPT)
    with shaped(*LINKS[name]), opened(settings, model, **tables_for(BATCH, LENGTH)) as owners:
        step_times = alternate({setting: protected_step(owner, ids) for setting, owner in owners.items()}, rounds)
        answers = {setting: partial(answer, owner, prompt, NEW) for setting, owner in owners.items()}
        token_times = alternate(answers, rounds)
        figures = {setting: owner.tuner.figures() for setting, owner in owners.items()}
    times_of = {"step": step_times, "generation": token_times}
    to_compact = {what: ratios(times, "compact") for what, times in times_of.items()}
    return [
        {
            "link": name,
            "design": CASES[setting][0],
            "setting": setting,
            "step_seconds": summary(step_times[setting]),
            "token_seconds": summary([seconds / NEW for seconds in token_times[setting]]),
            "crossings_per_step": found["crossings_per_step"],
            "border_bytes_per_step": found["border_bytes_per_step"],
            **{f"{what}_ratio_to_compact": found_.get(setting) for what, found_ in to_compact.items()},
        }
        for setting, found in figures.items()
    ]


def measure(quick: bool) -> list[Row]:
    """One row a link and setting."""
    if quick:
        return _link(next(iter(LINKS)), "random:llama:2,64,4,500", ("compact", "veil"), 2)
    rows: list[Row] = []
    for name, link in LINKS.items():
        settings = {"link": link, "settings": SETTINGS, "rounds": ROUNDS}
        rows += cell("network", settings, lambda name=name: _link(name, SMOLLM2, SETTINGS, ROUNDS))
    return rows


if __name__ == "__main__":
    run("network", __doc__, measure)
