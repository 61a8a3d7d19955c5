"""From a study's file to the cells that are to be measured: every configuration made and checked before the first run.

A cell's digest covers all that its outcome depends on: the configuration without its output directory, versions, what the
sources hold, and of an attack its settings, moment, limit, seed and public text. So what was measured once need not be
again, and what changed is.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veiltune.attacks import Attack, make_attack
from veiltune.config import Config, load_config
from veiltune.designs import DESIGNS, option_tables
from veiltune.errors import ConfigError, UserError, VeiltuneError
from veiltune.evaluation.attacking import require_fit
from veiltune.evaluation.inputs import check_inputs
from veiltune.evaluation.studies.grammar import AttackEntry, DesignEntry, StudyFile, TaskEntry, flat
from veiltune.evaluation.truth import Moment
from veiltune.models.cache import cache_key, cache_root, file_sha256
from veiltune.models.cut import Cut
from veiltune.models.packages import find_package
from veiltune.models.sources import resolve_config
from veiltune.results import versions
from veiltune.study_records import STUDY_SCHEMA
from veiltune.study_terms import ALL_PHASES, Phase

_UNNAMED = ("data", "evaluate", "enclave", "session")
"""Tables that tell no setting from another: they are left out of a label that is made."""
_NO_OUTPUT = Path("unset")
_OUTCOME_FREE = {"output": True, "session": {"record", "token_file", "retry_seconds"}}
"""Of a configuration: what no figure depends on."""


@dataclass(frozen=True)
class AttackPlan:
    """One attack on one phase of one run; ``cell`` is its digest, ``phase`` is ``None`` of an attack on no texts."""

    cell: str
    attack: Attack
    phase: Phase | None
    moment: Moment
    limit: int
    corpus: str | None


@dataclass(frozen=True)
class RunPlan:
    """One run and the attacks on it.

    Attributes:
        cell: its digest.
        setting: the label of its options.
        task: name of the task.
        config: without an output directory.
        recorded: of a run of its own that the attacks read; ``None``: they read this one.
        attacks: in the order they are made.
    """

    cell: str
    setting: str
    task: str
    config: Config
    recorded: Config | None
    attacks: tuple[AttackPlan, ...]

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.config.design} ({self.setting}), {self.task}, seed {self.config.seed}"


@dataclass(frozen=True)
class Study:
    """Every run, in the order they are made: all designs on the first task and seed first, so that they can be compared early."""

    name: str
    title: str
    keep_transcripts: bool
    runs: tuple[RunPlan, ...]

    @property
    def cells(self) -> list[str]:
        """Every cell's digest, runs and their attacks in order."""
        return [cell for run in self.runs for cell in (run.cell, *(each.cell for each in run.attacks))]


@dataclass(frozen=True)
class _Variant:
    """One entry at one point of its sweep."""

    entry: DesignEntry
    setting: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class _Chosen:
    """One attack of the study's, at one point of its sweep."""

    name: str
    attack: Attack
    entry: AttackEntry


def plan_study(file: StudyFile) -> Study:
    """Make and check every cell.

    Raises:
        UserError: a configuration, an attack or its settings cannot be used, an attack that an entry names is not made for its
            design, or two cells have one label; says which entry.
        DataError: data that cannot be read.
        ModelError: the model's configuration cannot be read.
    """
    attacks = list(_attacks(file))
    variants = [variant for entry in file.designs for variant in _variants(entry)]
    labels = [(each.entry.design, each.setting) for each in variants]
    for design, setting in labels:
        if labels.count((design, setting)) > 1:
            raise ConfigError(
                f"{labels.count((design, setting))} cells are called {design} ({setting})",
                hint="give each entry a `setting` of its own",
            )
    contents = {source: _content(source) for source in file.sources}  # each looked at once
    runs: list[RunPlan] = []
    checked: set[str] = set()
    for seed, task, variant in itertools.product(file.tables.seeds, file.tasks, variants):
        where = f"{variant.entry.design} ({variant.setting})"
        try:
            runs.append(_run(file, seed, task, variant, attacks, contents))
            _check(runs[-1].config, checked)
        except UserError as error:
            raise type(error)(f"{where}: {error.message}", hint=error.hint) from None
    if len({run.cell for run in runs}) < len(runs):
        raise ConfigError("two cells of the study are the same but for their labels", hint="leave one of them out")
    return Study(file.name, file.title, file.tables.keep_transcripts, tuple(runs))


# --- what is run ------------------------------------------------------------------------------------------------------


def _points(sweep: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of the values; one empty point of an empty sweep."""
    yield from (dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values()))


def _variants(entry: DesignEntry) -> Iterator[_Variant]:
    tables = {key: value for key, value in entry.tables.items() if key not in _UNNAMED}
    for point in _points(entry.sweep):
        named = point if entry.setting is not None else {**flat(tables), **point}
        parts = [*([entry.setting] if entry.setting is not None else []), *_named(named)]
        overrides = tuple(f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in point.items())
        yield _Variant(entry, ", ".join(parts) or "defaults", overrides)


def _named(values: Mapping[str, Any]) -> list[str]:
    """``activation_bits=8``: by the last word of each key, or its last two where that is another's as well."""
    leaves = [key.rpartition(".")[2] for key in values]
    short = {
        key: leaf if leaves.count(leaf) == 1 else ".".join(key.split(".")[-2:])
        for key, leaf in zip(values, leaves, strict=True)
    }
    return [f"{short[key]}={value}" for key, value in values.items()]


def _config(file: StudyFile, seed: int, task: TaskEntry, variant: _Variant, changes: Mapping[str, Any]) -> Config:
    given = {
        "design": variant.entry.design,
        "model": file.tables.model,
        "output": str(_NO_OUTPUT),
        "seed": seed,
        "data": {"train": task.train, "validation": task.validation},
        "lora": {"init_seed": seed},  # designs are to start alike
        "evaluate": {"tasks": list(task.evaluate)},
    }
    for tables in (file.tables.shared(), variant.entry.tables, changes):
        given = _merged(given, tables)
    return load_config(given, overrides=variant.overrides, options=option_tables())


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``, table by table."""
    both = {**base, **over}
    nested = {key: _merged(base[key], over[key]) for key in both if _are_tables(base.get(key), over.get(key))}
    return {**both, **nested}


def _are_tables(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _run(
    file: StudyFile,
    seed: int,
    task: TaskEntry,
    variant: _Variant,
    attacks: Sequence[_Chosen],
    contents: Mapping[str, str | None],
) -> RunPlan:
    entry, corpus = variant.entry, file.tables.corpus
    config = _config(file, seed, task, variant, {})
    recorded = _config(file, seed, task, variant, entry.recorded) if entry.recorded else None
    held = [contents[source] for source in (file.tables.model, *task.sources)]
    measured = [STUDY_SCHEMA, _decisive(config), versions(), held]
    planned: list[AttackPlan] = []
    attacked = recorded or config
    apart = DESIGNS[attacked.design].tunes_apart
    for each, phase in _in_phases(list(_fitting(entry, attacks, attacked)), attacked):
        moment = _moment(each.entry, phase)
        limit = each.entry.limit if apart else each.entry.limit_in(phase)
        made = [each.attack.name, dataclasses.asdict(each.attack), moment, limit]
        made += [phase] if phase is not None and (apart or phase != "tuning") else []  # as before there were phases
        learnt = [corpus, contents.get(corpus or "")] if "corpus" in each.attack.auxiliary else []
        cell = cache_key("attack", measured, None if recorded is None else _decisive(recorded), made, learnt)
        planned.append(AttackPlan(cell, each.attack, phase, moment, limit, corpus))
    return RunPlan(cache_key("run", measured), variant.setting, task.name, config, recorded, tuple(planned))


def _decisive(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=_OUTCOME_FREE)


def _content(source: str) -> str | None:
    """What tells a source from itself at another time; ``None`` where its name alone does."""
    kind, _, rest = source.partition(":")
    if kind == "package":
        return find_package(rest.partition("/")[0]).version
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        stamps = [(each.stat().st_size, each.stat().st_mtime_ns) for each in files]
        return cache_key([str(each.relative_to(path)) for each in files], stamps)
    return file_sha256(path, cache_root()) if path.is_file() else None


def _check(config: Config, checked: set[str]) -> None:
    """What else would fail only once its run begins. Data that was checked once is not read again."""
    design = DESIGNS[config.design]
    if config.train.method not in design.methods:
        raise ConfigError(
            f"train.method = {config.train.method!r}: it cannot train that", hint=", ".join(sorted(design.methods))
        )
    if design.is_cut:
        Cut.of(resolve_config(config.model), config.cut.bottom_layers, config.cut.top_layers)
    inputs = config.data.model_dump_json() + config.evaluate.model_dump_json() + str(config.seed)
    if inputs not in checked:
        check_inputs(config)
        checked.add(inputs)


# --- what is attacked -------------------------------------------------------------------------------------------------


def _attacks(file: StudyFile) -> Iterator[_Chosen]:
    """Every attack of the study with its settings."""
    seen: dict[tuple[str, str, str], str] = {}
    for name, entry in file.attacks.items():
        for point in _points(entry.sweep):
            try:
                attack = make_attack(entry.attack, {**entry.settings, **point})
            except VeiltuneError as error:
                raise ConfigError(f"attacks.{name}: {error.message}", hint=error.hint) from None
            heading = (attack.name, attack.setting, entry.moment)
            if heading in seen:
                raise ConfigError(
                    f"attacks.{name} is what attacks.{seen[heading]} is: {attack.name} on the {entry.moment} texts",
                    hint="leave one of them out, or give them other settings",
                )
            seen[heading] = name
            yield _Chosen(name, attack, entry)


def _fitting(entry: DesignEntry, attacks: Sequence[_Chosen], config: Config) -> Iterator[_Chosen]:
    """The attacks that the entry names, or all that are made for its design and options.

    Raises:
        UserError: one that it names is not.
    """
    for each in attacks:
        if entry.attacks is not None and each.name not in entry.attacks:
            continue
        try:
            require_fit(each.attack, config)
        except UserError:
            if entry.attacks is not None:
                raise
            continue
        yield each


def _in_phases(chosen: Sequence[_Chosen], config: Config) -> Iterator[tuple[_Chosen, Phase | None]]:
    """Each attack in each phase that the run has, those on the texts tuned on first.

    Later phases are attacked once with the same settings, whatever moments of tuning the study asks for. Where nothing crosses in
    a phase, one attack of each observer is planned there: all it does is to count.
    """
    apart = DESIGNS[config.design].tunes_apart
    seen: set[Any] = set()
    for phase in _phases(config):
        for each in chosen:
            if not each.attack.of_texts or phase not in (each.entry.phases or _phases(config)):
                continue
            counts = apart and phase != "questions"
            if phase not in each.attack.phases and not counts:
                continue
            one = each.attack.observer if counts else (each.attack, _moment(each.entry, phase))
            if (phase, one) not in seen:
                seen.add((phase, one))
                yield each, phase
    yield from ((each, None) for each in chosen if not each.attack.of_texts)


def _phases(config: Config) -> list[Phase]:
    has = {"tuning": config.data.train, "validation": config.data.validation, "questions": config.evaluate.tasks}
    return [phase for phase in ALL_PHASES if has.get(phase)]


def _moment(entry: AttackEntry, phase: Phase | None) -> Moment:
    """Questions are attacked as they cross last, after tuning: that is what inference is."""
    return entry.moment if phase in {None, "tuning"} else "last"
