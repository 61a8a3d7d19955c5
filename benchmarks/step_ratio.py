"""Seconds of a training step under protection, as a ratio to the plain PEFT step, alternating in one run.

The plain step is `transformers` and `peft` alone, in this process: forward with labels on every token, backward, AdamW. The
protected step is the same work over several processes. LoRA rank 16, on every linear (designs that cut the model: on those of the
owner's 2 + 2 layers, against the plain step on all), float32, random token ids. All settings of a model and a batch take turns in
one run, each in a session of its own that stays open; idle processes wait passively, and the plain step runs with the threading
defaults a user would have. Memory is each party's largest resident set over a session of its own, with two steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks._cells import cell
from benchmarks._record import Row, alternate, run
from benchmarks._runs import SMOLLM2, live
from benchmarks._steps import (
    CASES,
    LORA,
    cut_step,
    peak_memory,
    plain_step,
    random_ids,
    steps_by_turns,
    tables_for,
    timed_row,
)
from veiltune.models.accounting import shares
from veiltune.models.cut import Cut
from veiltune.models.sources import resolve_config
from veiltune.models.veil_accounting import veil_shares

BATCH, LENGTH = 4, 128
LONG = (1, 512)


@dataclass(frozen=True)
class Group:
    """Settings of one model and one batch that take turns.

    Attributes:
        model: source.
        name: for people.
        batch: sequences and their length.
        settings: of `CASES`.
        rounds: how often each is timed.
    """

    model: str
    name: str
    batch: tuple[int, int]
    settings: tuple[str, ...]
    rounds: int


FOUR = ("local", "compact", "paper", "veil")
TWO = ("compact", "veil")
"""Of larger models no more than two sessions fit into 24 GiB beside one another."""
OTHER_TWO = ("local", "paper")
GROUPS = (
    Group(SMOLLM2, "SmolLM2-135M-Instruct", (BATCH, LENGTH), tuple(CASES), 12),
    Group(SMOLLM2, "SmolLM2-135M-Instruct", LONG, (*FOUR, "veil, optimiser on the host"), 6),
    Group("random:gpt2-small", "random GPT-2 small", (BATCH, LENGTH), FOUR, 6),
    Group("random:gpt2-small", "random GPT-2 small", LONG, FOUR, 6),
    Group("random:gpt2-medium", "random GPT-2 medium", (BATCH, LENGTH), TWO, 3),
    Group("random:gpt2-medium", "random GPT-2 medium", LONG, TWO, 3),
    Group("random:qwen2-0.5b", "random Qwen2-0.5B shape", (BATCH, LENGTH), TWO, 3),
    Group("random:qwen2-0.5b", "random Qwen2-0.5B shape", LONG, TWO, 3),
    Group("random:gpt2-medium", "random GPT-2 medium", (BATCH, LENGTH), OTHER_TWO, 3),
    Group("random:gpt2-medium", "random GPT-2 medium", LONG, OTHER_TWO, 3),
    Group("random:qwen2-0.5b", "random Qwen2-0.5B shape", (BATCH, LENGTH), OTHER_TWO, 3),
    Group("random:qwen2-0.5b", "random Qwen2-0.5B shape", LONG, OTHER_TWO, 3),
)
QUICK = Group("random:gpt2", "random GPT-2, tiny", (BATCH, LENGTH), ("compact", "veil"), 2)

CUT_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "32 bits": ("split", {}),
    "int8, α = 1": ("online", {"decorrelation": {"alpha": 1.0}}),
    "first epoch": ("gradfree", {}),
    "later epochs": ("gradfree", {}),
    "half the trunk's layers": ("offsite", {"plug_in": False}),
    "half the trunk's layers, int8, α = 1": ("offline", {}),
}
CUT_ROUNDS = 6


def _flop_share(model: str, design: str, options: dict[str, Any], batch: int, length: int) -> float | None:
    """The enclave's share of a forward pass's operations."""
    config = resolve_config(model)
    if design == "veil":
        cut = Cut.of(config, options["enclave_layers"], 0)
        return veil_shares(config, cut, batch, length).flop_share
    return shares(config, options["placement"], batch, length).flop_share if design == "obfuscatune" else None


def _measure_group(group: Group) -> list[Row]:
    batch, length = group.batch
    rows: list[Row] = []
    times, figures = steps_by_turns(group.settings, group.model, batch, length, group.rounds)
    for setting, found in figures.items():
        design, options = CASES[setting]
        wait, engine = found.get("wait_seconds", 0.0), found.get("engine_seconds", 0.0)
        rows.append(
            {
                "design": design,
                "setting": setting,
                "placement": options.get("placement"),
                "optimizer_at": options.get("optimizer_at"),
                "model": group.name,
                **timed_row(times, setting, found, batch, length),
                "enclave_seconds_share": None if design == "local" else 1 - wait / engine,
                "enclave_flops_share": _flop_share(group.model, design, options, batch, length),
            }
        )
    return rows


def _measure_cut(model: str, name: str, rounds: int, settings: dict[str, tuple[str, dict[str, Any]]]) -> list[Row]:
    ids = random_ids(model, BATCH, LENGTH)
    rows: list[Row] = []
    plain = plain_step(model, ids)
    for setting, (design, options) in settings.items():
        memory = peak_memory((design, options), model, BATCH, LENGTH)
        with live(design, model, lora=LORA, **tables_for(BATCH, LENGTH), **{design: options}) as owner:
            step = cut_step(owner, ids, is_new=setting == "first epoch")
            times = alternate({"plain": plain, setting: step}, rounds, warmup=2)
            figures = owner.tuner.figures()
        rows.append(
            {
                "design": design,
                "setting": setting,
                "placement": None,
                "model": name,
                **timed_row(times, setting, figures, BATCH, LENGTH),
                "peak_rss": memory,
            }
        )
    return rows


def measure(quick: bool) -> list[Row]:
    """Designs with an enclave by model and batch; then designs that cut the model, on the real one."""
    if quick:
        tiny = {name: CUT_SETTINGS[name] for name in ("32 bits", "later epochs")}
        return _measure_group(QUICK) + _measure_cut("random:llama:6,64,4,500", "random Llama, tiny", 2, tiny)
    rows: list[Row] = []
    for group in GROUPS:
        settings = {"model": group.model, "batch": group.batch, "settings": group.settings, "rounds": group.rounds}
        rows += cell("step_ratio", settings, lambda group=group: _measure_group(group))
    for setting, design in CUT_SETTINGS.items():
        settings = {"model": SMOLLM2, "cut": setting, "rounds": CUT_ROUNDS}
        args = (SMOLLM2, "SmolLM2-135M-Instruct", CUT_ROUNDS, {setting: design})
        rows += cell("step_ratio", settings, lambda args=args: _measure_cut(*args))
    return rows


if __name__ == "__main__":
    run("step_ratio", __doc__, measure)
