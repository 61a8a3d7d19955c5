"""Seconds of a training step under protection, as a ratio to the plain PEFT step, alternating in one run.

The plain step is `transformers` and `peft` alone, in this process: forward with labels on every token, backward, AdamW. The
protected step is the same work over several processes. LoRA rank 16, on every linear (designs that cut the model: on those of the
owner's 2 + 2 layers, against the plain step on all), batch 4 x 128, float32, random token ids. Idle processes wait passively; the
plain step runs with the threading defaults a user would have. Memory is each party's largest resident set over a session of its
own, with two steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._cells import cell
from benchmarks._record import Row, Times, alternate, ratios, run, summary
from benchmarks._runs import SMOLLM2, config_for, live, session, temporary_output
from veiltune.examples import TokenizedExample
from veiltune.models.adapters import peft_config
from veiltune.models.families import find_family
from veiltune.models.sources import resolve_model
from veiltune.parties.owner import Owner
from veiltune.parties.party import Job

BATCH, LENGTH, RANK = 4, 128, 16
ROUNDS, FEW_ROUNDS = 12, 6
LORA = {"rank": RANK, "alpha": 32}
SETTINGS: dict[str, dict[str, str]] = {
    "compact": {"placement": "compact", "optimizer_at": "enclave"},
    "compact, optimiser on the host": {"placement": "compact", "optimizer_at": "host"},
    "paper": {"placement": "paper", "optimizer_at": "enclave"},
}


CUT_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "32 bits": ("split", {}),
    "int8, α = 1": ("online", {"decorrelation": {"alpha": 1.0}}),
    "first epoch": ("gradfree", {}),
    "later epochs": ("gradfree", {}),
    "half the trunk's layers": ("offsite", {"plug_in": False}),
    "half the trunk's layers, int8, α = 1": ("offline", {}),
}


def plain_step(model_source: str, ids: Tensor) -> Callable[[], None]:
    """The step a user of PEFT would run."""
    import peft

    checkpoint = resolve_model(model_source)
    config = config_for("local", model_source, Path("unused"), lora=LORA)
    family = find_family(checkpoint.config)
    base: Any = checkpoint.load_plain(torch.float32)
    model: Any = peft.get_peft_model(base, peft_config(config.lora, family, checkpoint.config.num_hidden_layers))
    model.train()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def protected_step(owner: Owner, ids: Tensor) -> Callable[[], None]:
    """The same step through the parties."""
    targets = ids.shape[0] * (ids.shape[1] - 1)

    def step() -> None:
        owner.tuner.accumulate(ids, torch.ones_like(ids), ids, targets)
        owner.tuner.step(1e-4)

    return step


def cut_step(owner: Owner, ids: Tensor, *, is_new: bool) -> Callable[[], None]:
    """The same step under a design that cuts the model; ``is_new``: every time other tokens, which nobody kept."""
    examples = [TokenizedExample(tuple(row), tuple(row)) for row in ids.tolist()]
    owner.before_training(examples, [])
    targets = ids.shape[0] * (ids.shape[1] - 1)
    drawn = torch.Generator().manual_seed(1)

    def step() -> None:
        batch = torch.randint(0, int(ids.max()), ids.shape, generator=drawn) if is_new else ids
        owner.tuner.accumulate(batch, torch.ones_like(batch), batch, targets)
        owner.tuner.step(1e-4)

    return step


def _peak_memory(design: str, model: str, options: dict[str, Any]) -> dict[str, int]:
    """Each party's largest resident set over a short session."""
    with temporary_output() as output:
        data = output.with_name("examples.jsonl")
        row = json.dumps({"prompt": "a", "completion": " word" * LENGTH})
        data.write_text(f"{row}\n" * (2 * BATCH), encoding="utf-8")
        tables = {
            "data": {"train": str(data), "max_length": LENGTH, "too_long": "truncate"},
            "train": {"steps": 2, "batch_size": BATCH},
            design: options,
        }
        outcome = session(f"memory {design}", config_for(design, model, output, lora=LORA, **tables), Job(verb="tune"))
    return {role: figures["peak_rss"] for role, figures in outcome.figures.items()}


def _timed(times: Times, setting: str, figures: dict[str, Any]) -> Row:
    """What all rows say of a step."""
    return {
        "batch": BATCH,
        "length": LENGTH,
        "ratio": ratios(times, "plain")[setting],
        "plain_seconds": summary(times["plain"]),
        "seconds": summary(times[setting]),
        "crossings_per_step": figures["crossings_per_step"],
        "border_bytes_per_step": figures["border_bytes_per_step"],
    }


def _measure_cut(model: str, name: str, rounds: int, settings: dict[str, tuple[str, dict[str, Any]]]) -> list[Row]:
    vocabulary = resolve_model(model).config.vocab_size
    ids = torch.randint(0, vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    rows: list[Row] = []
    plain = plain_step(model, ids)
    for setting, (design, options) in settings.items():
        memory = _peak_memory(design, model, options)
        tables = {"data": {"max_length": LENGTH}, "train": {"batch_size": BATCH}, design: options}
        with live(design, model, lora=LORA, **tables) as owner:
            step = cut_step(owner, ids, is_new=setting == "first epoch")
            times = alternate({"plain": plain, setting: step}, rounds, warmup=2)
            figures = owner.tuner.figures()
        rows.append(
            {
                "design": design,
                "setting": setting,
                "placement": None,
                "model": name,
                **_timed(times, setting, figures),
                "peak_rss": memory,
            }
        )
    return rows


def _measure_model(model: str, name: str, rounds: int, settings: dict[str, dict[str, str]]) -> list[Row]:
    vocabulary = resolve_model(model).config.vocab_size
    ids = torch.randint(0, vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    rows: list[Row] = []
    plain = plain_step(model, ids)
    for setting, options in settings.items():
        tables = {"data": {"max_length": LENGTH}, "train": {"batch_size": BATCH}, "obfuscatune": options}
        with live("obfuscatune", model, lora=LORA, **tables) as owner:
            step = protected_step(owner, ids)
            times = alternate({"plain": plain, setting: step}, rounds, warmup=2)
            figures = owner.tuner.figures()
        rows.append(
            {
                "design": "obfuscatune",
                "setting": setting,
                "placement": options["placement"],
                "optimizer_at": options["optimizer_at"],
                "matrix": options.get("matrix", "orthogonal"),
                "model": name,
                **_timed(times, setting, figures),
                "enclave_seconds_share": 1 - figures["wait_seconds"] / figures["engine_seconds"],
            }
        )
    return rows


def measure(quick: bool) -> list[Row]:
    """Both models, both placements; then designs that cut the model, on the real one."""
    if quick:
        rows = _measure_model("random:gpt2", "random GPT-2, tiny", 2, {"compact": SETTINGS["compact"]})
        tiny = {name: CUT_SETTINGS[name] for name in ("32 bits", "later epochs")}
        return rows + _measure_cut("random:llama:6,64,4,500", "random Llama, tiny", 2, tiny)
    rows: list[Row] = []
    for model, name, chosen, rounds in (
        (SMOLLM2, "SmolLM2-135M-Instruct", list(SETTINGS), ROUNDS),
        ("random:gpt2-small", "random GPT-2 small", ["compact", "paper"], FEW_ROUNDS),
    ):
        for setting in chosen:
            one = {setting: SETTINGS[setting]}
            settings = {"model": model, "setting": setting, "rounds": rounds}
            rows += cell("step_ratio", settings, lambda args=(model, name, rounds, one): _measure_model(*args))
    for setting, design in CUT_SETTINGS.items():
        settings = {"model": SMOLLM2, "cut": setting, "rounds": FEW_ROUNDS}
        args = (SMOLLM2, "SmolLM2-135M-Instruct", FEW_ROUNDS, {setting: design})
        rows += cell("step_ratio", settings, lambda args=args: _measure_cut(*args))
    return rows


if __name__ == "__main__":
    run("step_ratio", __doc__, measure)
