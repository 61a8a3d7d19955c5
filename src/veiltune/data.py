"""Training data from files, hub data sets and packages, checked line by line.

Columns are told from the first row, in this order: ``messages``; ``prompt`` and ``completion``; ``text``. Every later
row must have them. Nothing is skipped silently: a row that cannot be used is an error that names the file and the
line.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from veiltune.batching import Batch, batches, collate, steps_per_epoch
from veiltune.choices import TASKS, training_examples
from veiltune.config import Config
from veiltune.errors import DataError, nearest
from veiltune.examples import (
    IGNORED,
    Conversation,
    Example,
    PlainText,
    PromptCompletion,
    TokenizedExample,
    encode_continuation,
    encode_prompt,
    tokenize,
)
from veiltune.models.packages import normalise
from veiltune.tee.container.ring import SEALED, SealedFile, open_sealed_file

__all__ = [
    "IGNORED",
    "Batch",
    "Conversation",
    "Example",
    "PlainText",
    "PromptCompletion",
    "TokenizedExample",
    "batches",
    "collate",
    "encode_continuation",
    "encode_prompt",
    "load_examples",
    "load_tokenized",
    "steps_per_epoch",
    "tokenize",
]

ROLES = ("system", "user", "assistant", "tool")
FORMS = "messages, prompt and completion, or text"
_COLUMNS = (("messages",), ("prompt", "completion"), ("text",))
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?(@[\w./-]+)?")
Row = tuple[str, dict[str, Any]]
"""Where a row stands (``notes.jsonl:17``), and its values by column."""


def load_tokenized(source: str, config: Config, tokenizer: Any, *, split: str) -> list[TokenizedExample]:
    """A run's examples from one of its sources, as its owner trains on them.

    Raises:
        DataError: the source cannot be used, or an example is too long.
    """
    data = config.data
    examples = load_examples(source, split=split, limit=data.limit, seed=config.seed)
    return [tokenize(example, tokenizer, data.max_length, too_long=data.too_long) for example in examples]


def load_examples(
    source: str, *, split: str = "train", limit: int | None = None, seed: int = 0, cache_dir: Path | None = None
) -> list[Example]:
    """All examples of a source, or ``limit`` of them drawn by ``seed`` (in the source's order).

    Args:
        source: a ``.jsonl``, ``.csv`` or ``.parquet`` file; a directory with ``SPLIT.jsonl`` (or ``.csv``,
            ``.parquet``); a hub data set ``OWNER/NAME`` (``:CONFIG`` and ``@REVISION`` optional);
            ``package:DISTRIBUTION/TASK``; or ``sealed:PATH``, one such file in a container.
        split: which split of a directory, a hub data set or a task; a single file has none and is taken whole.
        limit: at most this many examples.
        seed: of the draw.
        cache_dir: root of Veiltune's cache.

    Raises:
        DataError: no such source, an empty one, or a row that is malformed or lacks the first row's columns.
        CheckpointError: a sealed file does not open.
    """
    if source.startswith("package:"):
        return list(_from_package(source, split, limit, seed, cache_dir))
    examples = _to_examples(_rows(source, split), source)
    if limit is not None and limit < len(examples):
        chosen = random.Random(seed).sample(range(len(examples)), limit)  # noqa: S311 - a repeatable draw
        examples = [examples[number] for number in sorted(chosen)]
    return examples


def _rows(source: str, split: str) -> Iterator[Row]:
    if source.startswith(SEALED):
        sealed = open_sealed_file(source, purpose="data")
        if sealed.suffix not in _READERS:
            raise DataError(
                f"{source!r} holds {sealed.name!r}, which has none of the endings {', '.join(_READERS)}",
                hint="convert it to JSON lines, and seal that",
            )
        return _READERS[sealed.suffix](sealed)
    path = Path(source).expanduser()
    if path.is_dir():
        path = _split_file(path, split)
    if path.is_file() and path.suffix in _READERS:
        return _READERS[path.suffix](path)
    return _from_elsewhere(source, path, split)


def _from_package(
    source: str, split: str, limit: int | None, seed: int, cache_dir: Path | None
) -> list[PromptCompletion]:
    distribution, _, task = source.removeprefix("package:").partition("/")
    own = [name for name, entry in TASKS.items() if normalise(entry.distribution) == normalise(distribution)]
    if not own:
        known = sorted({entry.distribution for entry in TASKS.values()})
        raise DataError(f"no task is known in distribution {distribution!r}", hint=nearest(distribution, known))
    if task not in own:
        raise DataError(f"distribution {distribution!r} has no task {task!r}", hint=nearest(task, own))
    return training_examples(task, limit, seed, split=split, cache_dir=cache_dir)


def _split_file(directory: Path, split: str) -> Path:
    for suffix in _READERS:
        if (directory / f"{split}{suffix}").is_file():
            return directory / f"{split}{suffix}"
    names = ", ".join(f"{split}{suffix}" for suffix in _READERS)
    raise DataError(
        f"directory {str(directory)!r} has no file for the split {split!r}", hint=f"it should hold one of: {names}"
    )


def _from_elsewhere(source: str, path: Path, split: str) -> Iterator[Row]:
    """Not a readable file of a known kind: a hub data set, or a mistake."""
    if path.is_file():
        raise DataError(
            f"{source!r} has none of the endings {', '.join(_READERS)}", hint="convert it to JSON lines, or rename it"
        )
    if path.suffix in _READERS or path.is_absolute() or source.startswith((".", "~")) or not _HUB_ID.fullmatch(source):
        raise DataError(
            f"there is no file {source!r}", hint="give a file, a directory, a hub data set or package:DISTRIBUTION/TASK"
        )
    return _read_hub(source, split)


def _read_jsonl(path: Path | SealedFile) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path.name}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    raise DataError(
                        f"{where}: the line is empty", hint="remove it, or complete the file if it was cut off"
                    )
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: byte {error.start} of the line is not UTF-8", hint="save the file as UTF-8"
                ) from None
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: no valid JSON: {error.msg} at column {error.colno}", hint="one JSON object a line"
                ) from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{where}: expected a JSON object, found {type(row).__name__}", hint=f"give columns {FORMS}"
                )
            yield where, row


def _read_csv(path: Path | SealedFile) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                where = f"{path.name}:{reader.line_num}"
                expected = len(reader.fieldnames or [])
                found = _num_cells(row)
                if found != expected:
                    raise DataError(
                        f"{where}: {found} cells, the header names {expected}",
                        hint="quote cells that hold commas or breaks",
                    )
                yield where, row
        except csv.Error as error:
            where = f"{path.name}:{reader.line_num + 1}"
            raise DataError(f"{where}: no valid CSV: {error}", hint="check the quotes") from None
        except UnicodeDecodeError:
            raise DataError(f"{path.name}:{reader.line_num + 1}: not UTF-8", hint="save the file as UTF-8") from None


def _num_cells(row: Mapping[Any, Any]) -> int:
    """Cells of a DictReader's row: the named ones that are there, and those beyond the header (under ``None``)."""
    return sum(value is not None for name, value in row.items() if name is not None) + len(row.get(None) or [])


def _read_parquet(path: Path | SealedFile) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as stream, pq.ParquetFile(stream) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path.name}: no readable Parquet file: {_first_line(error)}", hint="write the file again"
        ) from None


def _read_hub(source: str, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    name, _, revision = source.partition("@")
    repository, _, config = name.partition(":")
    try:
        rows = load_dataset(repository, config or None, split=split, revision=revision or None)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"data {source!r} is no local file, and the hub did not give its split {split!r}: {_first_line(error)}",
            hint="check the name, the split and the network, or give a file or package:DISTRIBUTION/TASK",
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"{repository}/{split}:{number}", dict(row)


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def _to_examples(rows: Iterable[Row], source: str) -> list[Example]:
    examples: list[Example] = []
    columns: tuple[str, ...] | None = None
    for where, row in rows:
        columns = columns or _detect_columns(where, row)
        missing = [name for name in columns if row.get(name) is None]
        if missing:
            raise DataError(
                f"{where}: {' and '.join(missing)} missing (found: {_names(row)})",
                hint=f"every row needs {' and '.join(columns)}",
            )
        examples.append(_to_example(where, row, columns))
    if not examples:
        raise DataError(f"{source!r} holds no examples", hint=f"give rows with {FORMS}")
    return examples


def _detect_columns(where: str, row: dict[str, Any]) -> tuple[str, ...]:
    for columns in _COLUMNS:
        if all(name in row for name in columns):
            return columns
    raise DataError(f"{where}: no known columns (found: {_names(row)})", hint=f"rename the columns to {FORMS}")


def _to_example(where: str, row: dict[str, Any], columns: tuple[str, ...]) -> Example:
    if columns == ("messages",):
        return Conversation(_messages(where, row["messages"]), where)
    for name in columns:
        if not isinstance(row[name], str):
            raise DataError(f"{where}: {name} is {type(row[name]).__name__}, not text", hint="quote it")
    if columns == ("text",):
        _require_text(where, "text", row["text"])
        return PlainText(row["text"], where)
    _require_text(where, "completion", row["completion"])
    return PromptCompletion(row["prompt"], row["completion"], where)


def _messages(where: str, value: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(value, str):  # a CSV cell
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(
                f"{where}: messages is no valid JSON", hint='write [{"role": …, "content": …}, …]'
            ) from None
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages is no list of turns", hint='write [{"role": …, "content": …}, …]')
    turns: list[tuple[str, str]] = []
    for number, turn in enumerate(value, start=1):
        role = turn.get("role") if isinstance(turn, dict) else None
        content = turn.get("content") if isinstance(turn, dict) else None
        if role not in ROLES or not isinstance(content, str):
            raise DataError(
                f"{where}: message {number} has role {role!r} and content of type {type(content).__name__}",
                hint=f"roles are {', '.join(ROLES)}; the content is text",
            )
        _require_text(where, f"the content of message {number}", content)
        turns.append((role, content))
    if all(role != "assistant" for role, _ in turns):
        raise DataError(f"{where}: no message has the role 'assistant'", hint="nothing to learn from; remove the row")
    return tuple(turns)


def _require_text(where: str, name: str, value: str) -> None:
    if not value.strip():
        raise DataError(f"{where}: {name} is empty", hint="fill it in, or remove the row")


def _names(row: dict[str, Any]) -> str:
    return ", ".join(row) or "nothing"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
