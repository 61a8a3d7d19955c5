"""Peak memory while a checkpoint is protected and handed to the host, against the checkpoint's own size.

Random OPT-1.3B in bfloat16, nothing computed: the provider reads a tensor or two at a time, the enclave masks them in float64
and passes them on, the host keeps them. `grown_bytes` is a party's peak resident set less what its process takes for a tiny
model; `sum_grown_bytes` adds the three peaks, which no single moment reaches.
"""

from __future__ import annotations

import math
from typing import Any

from benchmarks._record import Row, run
from benchmarks._runs import config_for, session, temporary_output
from veiltune.models.sources import resolve_model
from veiltune.parties.party import Job

PARTIES = ("provider", "enclave", "host")


def _peaks(model: str) -> dict[str, int]:
    with temporary_output() as output:
        config = config_for("obfuscatune", model, output, dtype="bfloat16", data={"max_length": 64})
        figures = session(model, config, Job(verb="provision", native=True)).figures
    return {party: int(figures[party]["peak_rss"]) for party in PARTIES}


def measure(quick: bool) -> list[Row]:
    """One row: what each party's peak grew by, and the bound it must stay below."""
    import torch

    model = "random:opt:4,512,8,50272" if quick else "random:opt-1.3b"
    checkpoint = resolve_model(model, dtype=torch.bfloat16)
    checkpoint_bytes = 2 * checkpoint.num_parameters
    sizes = [math.prod(info.shape) for name, info in checkpoint.index.items() if ".layers.0." in name]
    block_bytes = 2 * sum(sizes)
    tiny, full = _peaks("random:opt"), _peaks(model)
    grown = {party: full[party] - tiny[party] for party in PARTIES}
    row: dict[str, Any] = {
        "model": model,
        "dtype": "bfloat16",
        "checkpoint_bytes": checkpoint_bytes,
        "block_bytes": block_bytes,
        "bound_bytes": checkpoint_bytes + block_bytes,
        "peak_rss": full,
        "grown_bytes": grown,
        "largest_grown_bytes": max(grown.values()),
        "sum_grown_bytes": sum(grown.values()),
    }
    return [row]


if __name__ == "__main__":
    run("protect_memory", __doc__, measure)
