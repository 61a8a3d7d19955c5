"""What can be known to be wrong before any party is started: seconds instead of a session's start-up."""

from __future__ import annotations

from pathlib import Path

from veiltune.choices import find_task
from veiltune.config import Config
from veiltune.data import load_examples
from veiltune.errors import DataError

_FILES = (".jsonl", ".csv", ".parquet")


def check_inputs(config: Config) -> None:
    """Read the data that is on this machine, and look up the tasks.

    A hub data set is left to the owner's party, which checks everything again, with the tokenizer.

    Raises:
        DataError: no data, a file or line that cannot be used, or an unknown task.
    """
    for name in config.evaluate.tasks:
        if Path(name).suffix not in {".yaml", ".yml"}:
            find_task(name)
        elif not Path(name).is_file():
            raise DataError(f"there is no task file {name!r}", hint="check the path")
    if config.data.train is None:
        raise DataError("there is nothing to train on: data.train is not set", hint='add [data] train = "FILE"')
    for split, source in (("train", config.data.train), ("validation", config.data.validation)):
        if source is not None and _is_here(source):
            load_examples(source, split=split, limit=config.data.limit, seed=config.seed)


def _is_here(source: str) -> bool:
    path = Path(source).expanduser()
    return source.startswith("package:") or path.suffix in _FILES or path.exists()
