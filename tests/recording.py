"""Recorded runs for tests of attacks: each made once, beside a file of public text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
from veiltune.attacks import make_attack
from veiltune.config import Config
from veiltune.evaluation import RESULT, result_of
from veiltune.evaluation.attacking import attack_run
from veiltune.results import write_result

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ 0123456789.,;"
Record = Callable[[str], Path]


def write_letters(path: Path, count: int, seed: int) -> Path:
    """Texts in which nothing follows from anything else."""
    draw = random.Random(seed)
    rows = ({"text": "".join(draw.choices(LETTERS, k=draw.randint(20, 28)))} for _ in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_questions(directory: Path) -> Path:
    """A task of four questions; its YAML."""
    rows = [
        {"query": f"{word} number {number}", "choices": ["yes", "perhaps"], "label": number % 2}
        for number, word in enumerate(("Lemon", "Quartz", "Violin", "Harbour"))
    ]
    (directory / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = directory / "questions.yaml"
    path.write_text(
        f"task: questions\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {directory / 'questions.jsonl'}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{query}}'\ndoc_to_choice: choices\n"
        "doc_to_target: label\nmetric_list:\n  - metric: acc\n",
        encoding="utf-8",
    )
    return path


def recorder(directory: Path, configure: Callable[[str, Path, str], Config], *, texts: int, public: int) -> Record:
    """Tuning runs by name, each made once; beside them ``public.jsonl``.

    Args:
        directory: of the runs.
        configure: from a run's name, its output directory and the victim's texts to its configuration.
        texts: of the victim.
        public: texts of the attacker.
    """
    victim = str(write_letters(directory / "victim.jsonl", texts, seed=1))
    write_letters(directory / "public.jsonl", public, seed=2)

    def record(name: str) -> Path:
        output = directory / name
        if not (output / RESULT).is_file():
            config = configure(name, output, victim)
            write_result(output / RESULT, result_of(config, helpers.run(config, "tune")))
        return output

    return record


def attacked(run: Path, name: str, *, at: Any = "first", limit: int = 4, **settings: Any) -> dict[str, Any]:
    """Findings by metric."""
    found = attack_run(
        run, make_attack(name, settings), moment=at, limit=limit, corpus=str(run.parent / "public.jsonl")
    )
    return {each.metric: each for each in found.findings}
