"""One training step, in the clear and under a design: what the benchmarks of time compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._record import Row, Times, alternate, ratios, summary
from benchmarks._runs import config_for, live, session, temporary_output
from veiltune.examples import TokenizedExample
from veiltune.models.adapters import peft_config
from veiltune.models.families import find_family
from veiltune.models.sources import resolve_model
from veiltune.parties.owner import Owner
from veiltune.parties.party import Job

RANK = 16
LORA = {"rank": RANK, "alpha": 32}
Case = tuple[str, dict[str, Any]]
"""A design, and its options."""

HOST, ENCLAVE = {"optimizer_at": "host"}, {"optimizer_at": "enclave"}
CASES: dict[str, Case] = {
    "local": ("local", {}),
    "compact": ("obfuscatune", {"placement": "compact", **ENCLAVE}),
    "compact, optimiser on the host": ("obfuscatune", {"placement": "compact", **HOST}),
    "paper": ("obfuscatune", {"placement": "paper", **ENCLAVE}),
    "veil": ("veil", {"enclave_layers": 0, **ENCLAVE}),
    "veil, optimiser on the host": ("veil", {"enclave_layers": 0, **HOST}),
    "veil, one enclave layer, optimiser on the host": ("veil", {"enclave_layers": 1, **HOST}),
}
"""Designs whose engine is not the owner."""


def random_ids(model: str, batch: int, length: int) -> Tensor:
    """The same random tokens at every call, as (batch, length)."""
    vocabulary = int(resolve_model(model).config.vocab_size)
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def plain_model(source: str) -> Any:
    """The model with PEFT's adapter, as a user of PEFT would have it."""
    import peft

    checkpoint = resolve_model(source)
    config = config_for("local", source, Path("unused"), lora=LORA)
    family = find_family(checkpoint.config)
    base: Any = checkpoint.load_plain(torch.float32)
    return peft.get_peft_model(base, peft_config(config.lora, family, checkpoint.config.num_hidden_layers))


def plain_step(source: str, ids: Tensor) -> Callable[[], None]:
    """The step a user of PEFT would run."""
    model = plain_model(source)
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


@contextmanager
def opened(settings: Iterable[str], model: str, **tables: Any) -> Generator[dict[str, Owner]]:
    """A live session for each setting of `CASES`, side by side."""
    with ExitStack() as stack:
        owners: dict[str, Owner] = {}
        for setting in settings:
            design, options = CASES[setting]
            owners[setting] = stack.enter_context(live(design, model, lora=LORA, **tables, **{design: options}))
        yield owners


def tables_for(batch: int, length: int) -> dict[str, Any]:
    """The tables of a configuration that trains on such batches."""
    return {"data": {"max_length": length}, "train": {"batch_size": batch}}


def steps_by_turns(
    settings: Iterable[str], model: str, batch: int, length: int, rounds: int
) -> tuple[Times, dict[str, dict[str, Any]]]:
    """Steps of every setting by turns with the plain one: times, and each tuner's figures."""
    ids = random_ids(model, batch, length)
    plain = plain_step(model, ids)
    with opened(settings, model, **tables_for(batch, length)) as owners:
        steps = {"plain": plain, **{setting: protected_step(owner, ids) for setting, owner in owners.items()}}
        times = alternate(steps, rounds, warmup=2)
        return times, {setting: owner.tuner.figures() for setting, owner in owners.items()}


def greedy(count: int) -> dict[str, Any]:
    """`transformers`' settings for that many tokens, always the likeliest."""
    return {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}


def answer(owner: Owner, prompt: Tensor, count: int) -> list[int]:
    """That many greedy tokens through the parties."""
    return list(owner.tuner.generate(prompt, greedy(count)))


def peak_memory(case: Case, model: str, batch: int, length: int) -> dict[str, int]:
    """Each party's largest resident set, in bytes, over a session of its own with two steps."""
    design, options = case
    with temporary_output() as output:
        data = output.with_name("examples.jsonl")
        row = json.dumps({"prompt": "a", "completion": " word" * length})
        data.write_text(f"{row}\n" * (2 * batch), encoding="utf-8")
        tables = {
            "data": {"train": str(data), "max_length": length, "too_long": "truncate"},
            "train": {"steps": 2, "batch_size": batch},
            design: options,
        }
        outcome = session(f"memory {design}", config_for(design, model, output, lora=LORA, **tables), Job(verb="tune"))
    return {role: figures["peak_rss"] for role, figures in outcome.figures.items()}


def timed_row(times: Times, setting: str, figures: dict[str, Any], batch: int, length: int) -> Row:
    """What all rows say of a step: seconds, and their ratio to the plain step of the same round."""
    border_bytes = figures.get("border_bytes_per_step", 0.0)
    row: Row = {
        "batch": batch,
        "length": length,
        "ratio": ratios(times, "plain")[setting],
        "plain_seconds": summary(times["plain"]),
        "seconds": summary(times[setting]),
        "crossings_per_step": figures.get("crossings_per_step", 0.0),
        "border_bytes_per_step": border_bytes,
        "border_bytes_per_token": border_bytes / (batch * length),
    }
    if "compact" in times and setting != "compact":
        row["ratio_to_compact"] = ratios(times, "compact")[setting]
    return row
