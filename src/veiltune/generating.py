"""``veiltune generate`` as people run it: one prompt through the protected model, its answer streamed to stdout."""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from veiltune.config import Config
from veiltune.display import Display, console
from veiltune.errors import UserError
from veiltune.evaluation import is_simulated
from veiltune.evaluation.asked import keep_asked
from veiltune.parties import Job
from veiltune.session import run_session
from veiltune.training import COMMIT

_OF_A_DRAW = ("temperature", "top_p", "top_k")


def run_generate(config: Config, prompt: str, decoding: Mapping[str, Any], *, as_json: bool = False) -> int:
    """Ask the model, as it was tuned if the run's output directory holds a checkpoint; returns the exit code.

    Args:
        config: of the run.
        prompt: the question.
        decoding: ``max_new_tokens``, ``sample``, ``temperature``, ``top_p``, ``top_k`` and ``seed``; ``None`` for what was
            not asked for.
        as_json: print one object on stdout, and nothing before it.

    Raises:
        UserError: an empty prompt.
        VeiltuneError: what made the session fail.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty", hint="give --prompt some text")
    settings = _settings(decoding)
    is_tuned = (Path(config.output) / COMMIT).is_file()
    with ExitStack() as stack:
        title = f"asking {config.model} under {config.design}, {'as tuned' if is_tuned else 'not tuned'}"
        display = stack.enter_context(Display(console(), title))
        if not is_tuned and not config.session.record:  # leave the output directory to the run that will make it
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="veiltune-generate-"))
            config = config.model_copy(update={"output": Path(scratch) / "run"})

        def on_event(event: str, fields: dict[str, Any]) -> None:
            display(event, fields)
            if event == "text" and not as_json:
                display.stop()
                sys.stdout.write(fields["text"])
                sys.stdout.flush()

        job = Job(verb="generate", prompt=prompt, settings=settings)
        outcome = run_session(config, job, on_event=on_event, resume=is_tuned)
        keep_asked(Path(config.output), outcome.owner["generated"])
    answer = {**outcome.owner["generated"], "is_tuned": is_tuned, "settings": settings}
    asked = {"design": config.design, "model": config.model}
    print(json.dumps({**asked, **answer, "simulated_enclave": is_simulated(outcome)}) if as_json else "", flush=True)  # noqa: T201
    if "seed" in settings and decoding["seed"] is None:
        print(f"drawn with --seed {settings['seed']}", file=sys.stderr)  # noqa: T201
    return 0


def _settings(decoding: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {name: decoding[name] for name in _OF_A_DRAW if decoding[name] is not None}
    draws = bool(decoding["sample"] or chosen)
    settings: dict[str, Any] = {"max_new_tokens": decoding["max_new_tokens"], "do_sample": draws}
    if draws:
        seed = secrets.randbelow(2**31) if decoding["seed"] is None else decoding["seed"]
        settings |= {**chosen, "seed": seed}
    return settings
