"""What authenticated links cost on one machine: a step of `veil` among services with keys, as a ratio to processes without.

SmolLM2-135M-Instruct, float32, LoRA rank 16, 4 x 128 tokens, the optimiser in the enclave. ``processes`` are what `veiltune tune`
starts by itself, linked by what they inherit. ``services`` are `veiltune party` with keys, mutual TLS and the enclave's evidence,
started as a user does; the owner, in this process, dials them. Between enclave and host payloads go through shared memory, or,
with `session.link = "tcp"`, through TLS; which it was is read from what the enclave has mapped. All sessions stay open and take
turns.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks._parties import parties
from benchmarks._record import Row, alternate, ratios, run, summary
from benchmarks._runs import SMOLLM2, live, temporary_output
from benchmarks._steps import CASES, LORA, protected_step, random_ids, tables_for
from veiltune.config import load_config
from veiltune.designs import option_tables
from veiltune.models.cache import cache_root
from veiltune.parties.owner import Owner
from veiltune.session.live import live_owner
from veiltune.transport.shared_memory import ARENA_NAME

BATCH, LENGTH, ROUNDS = 4, 128, 12
BASE = "processes"
DESIGN, OPTIONS = CASES["veil"]


SETTINGS = {"services, shared memory": "shared_memory", "services, TLS": "tcp"}
"""By what services say in ``session.link``."""


def _environment() -> Mapping[str, str]:
    """Of the services: as many threads as the processes have, and the models that this machine has."""
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    return {"OMP_NUM_THREADS": threads, "VEILTUNE_CACHE": str(cache_root())}


def _dotted(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{table}.{key}": value for table, keys in tables.items() for key, value in keys.items()}


@contextmanager
def _served(model: str, link: str) -> Generator[tuple[Owner, int]]:
    """A live session with services with keys; and the enclave's process."""
    agreed = {"design": DESIGN, "model": model, "session.retry_seconds": 60, "session.link": link}
    agreed |= _dotted({"lora": {**LORA, "init_seed": 1}, "enclave": {"allow_simulated": True}, DESIGN: OPTIONS})
    with (
        temporary_output() as directory,
        parties(directory, agreed, environment=_environment()) as made,
    ):
        path = made.write("owner", _dotted(tables_for(BATCH, LENGTH)))
        with live_owner(load_config(path, options=option_tables())) as owner:
            yield owner, made.running["enclave"].pid


def _data_plane(enclave: int) -> str:
    """What is between an enclave and its host, from what the enclave has mapped."""
    has_arena = ARENA_NAME in Path(f"/proc/{enclave}/maps").read_text(encoding="utf-8")
    return "shared memory" if has_arena else "TLS"


def _measure(model: str, settings: Mapping[str, str], rounds: int) -> list[Row]:
    ids = random_ids(model, BATCH, LENGTH)
    with ExitStack() as stack:
        processes = live(DESIGN, model, lora=LORA, **tables_for(BATCH, LENGTH), **{DESIGN: OPTIONS})
        owners = {BASE: stack.enter_context(processes)}
        planes = {BASE: "shared memory"}
        for setting, link in settings.items():
            owners[setting], enclave = stack.enter_context(_served(model, link))
            planes[setting] = _data_plane(enclave)
        steps = {setting: protected_step(owner, ids) for setting, owner in owners.items()}
        times = alternate(steps, rounds, warmup=2)
        figures = {setting: owner.tuner.figures() for setting, owner in owners.items()}
    found = ratios(times, BASE)
    return [
        {
            "design": DESIGN,
            "setting": setting,
            "data_plane": planes[setting],
            "batch": BATCH,
            "length": LENGTH,
            "step_seconds": summary(times[setting]),
            "ratio": found.get(setting),
            "crossings_per_step": figures[setting]["crossings_per_step"],
            "border_bytes_per_step": figures[setting]["border_bytes_per_step"],
        }
        for setting in owners
    ]


def measure(quick: bool) -> list[Row]:
    """One row a way of starting the parties."""
    if quick:
        return _measure("random:llama:2,64,4,500", SETTINGS, 2)
    return _measure(SMOLLM2, SETTINGS, ROUNDS)


if __name__ == "__main__":
    run("channels", __doc__, measure)
