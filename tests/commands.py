"""What the tests of the command line share: how a command is run, and a configuration for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import helpers
from veiltune.cli import main

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "The cat is red. What colour is it?"


@dataclass
class Ran:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What ``--json`` printed: one object, and nothing else."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


def runner(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs ``veiltune`` in this process, and captures what it prints."""

    def run(*arguments: str) -> Ran:
        capsys.readouterr()
        torch.manual_seed(0)
        with helpers.own_cache():
            code = main(arguments)
        printed = capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    return run


def write_config(directory: Path, model: str = "llama", **changes: Any) -> Path:
    """A TOML file beside its data, with ``output = DIRECTORY/out``; ``changes`` are dotted keys, with __ for the dots."""
    helpers.write_examples(directory / "notes.jsonl")
    values = {
        "design": "obfuscatune",
        "model": helpers.model_directory(model),
        "output": str(directory / "out"),
        "data.train": str(directory / "notes.jsonl"),
        "data.max_length": 96,
        "lora.rank": 4,
        "train.steps": 4,
        "train.batch_size": 4,
        "train.learning_rate": 0.01,
        "enclave.allow_simulated": True,
        "session.processes": False,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    path = directory / "run.toml"
    # Dotted keys make a flat file; a string in JSON is a string in TOML, and so are numbers and booleans.
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()), encoding="utf-8")
    return path


def outside(
    arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """The same as a program of its own; ``environment`` is what it has besides."""
    scratch = {"PYTHONPATH": str(ROOT / "src"), "VEILTUNE_CACHE": str(helpers.scratch() / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "veiltune", *arguments],
        env=os.environ | scratch | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
