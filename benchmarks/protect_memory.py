"""Peak memory while a checkpoint is protected and handed to the host, against the checkpoint's own size.

Random OPT-1.3B in bfloat16, nothing computed: the provider reads a tensor or two at a time, the enclave masks them in float64
and passes them on, the host keeps them. `grown_bytes` is a party's peak resident set less what its process takes for a tiny
model; `all_grown_bytes` is the same for the three processes together, at the worst single moment (sampled 20 times a second).
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import psutil
import torch

from benchmarks._record import Row, run
from benchmarks._runs import config_for, session, temporary_output
from veiltune.models.sources import resolve_model
from veiltune.parties.party import Job

PARTIES = ("provider", "enclave", "host")
SAMPLE_SECONDS = 0.05


class _Sampler(threading.Thread):
    """The largest sum of the resident sets of this process's children, as long as it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self.done = threading.Event()

    def run(self) -> None:
        """Sample until told to stop."""
        while not self.done.is_set():
            self.peak_bytes = max(self.peak_bytes, sum(map(_rss, psutil.Process().children())))
            time.sleep(SAMPLE_SECONDS)


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _peaks(model: str) -> tuple[dict[str, int], int]:
    """Peak resident set of each party, and of all at once."""
    sampler = _Sampler()
    sampler.start()
    with temporary_output() as output:
        config = config_for("obfuscatune", model, output, dtype="bfloat16", data={"max_length": 64})
        figures = session(model, config, Job(verb="provision", native=True)).figures
    sampler.done.set()
    sampler.join()
    return {party: int(figures[party]["peak_rss"]) for party in PARTIES}, sampler.peak_bytes


def measure(quick: bool) -> list[Row]:
    """One row: what each party's peak grew by, and the bound it must stay below."""
    model = "random:opt:6,1024,16,50272" if quick else "random:opt-1.3b"
    checkpoint = resolve_model(model, dtype=torch.bfloat16)
    checkpoint_bytes = 2 * checkpoint.num_parameters
    block_bytes = 2 * sum(math.prod(info.shape) for name, info in checkpoint.index.items() if ".layers.0." in name)
    tiny, tiny_all = _peaks("random:opt")
    full, full_all = _peaks(model)
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
        "all_grown_bytes": full_all - tiny_all,
    }
    return [row]


if __name__ == "__main__":
    run("protect_memory", __doc__, measure)
