"""The cells of a study, one after another: each run, then the attacks on it. What is recorded is never measured again.

Killed at any moment, the next call goes on. A run that was under way begins anew, rather than from a checkpoint: what it had
cost until then is not in the record of a run that was resumed. A run whose transcripts are gone, and on which an attack is
still to be made, is repeated for them; its record stays.
"""

from __future__ import annotations

import gc
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

from veiltune.config import Config
from veiltune.errors import ExactnessError, UserError, VeiltuneError
from veiltune.evaluation.attacking import Attacked, attack_run
from veiltune.evaluation.record import RESULT, result_of
from veiltune.evaluation.studies.grammar import flat
from veiltune.evaluation.studies.output import RECORDS
from veiltune.evaluation.studies.plan import AttackPlan, RunPlan, Study
from veiltune.parties.party import Job
from veiltune.results import RunResult, write_result, write_text
from veiltune.session import run_session
from veiltune.study_records import (
    AttackCell,
    AttackFigure,
    NothingCrossed,
    RunCell,
    TextSample,
    append_record,
    read_study,
)
from veiltune.study_terms import told_phase

Records = dict[str, RunCell | AttackCell]
OnEvent = Callable[[str, dict[str, Any]], None]

SAMPLES, SAMPLE_LETTERS = 3, 400
"""Texts that an attack's record shows, and how much of each."""
PRIVATE = ("transcript", "parties")
"""Of a run's directory: what observers saw, and the parties' own state (kept outputs, checkpoints, merged models)."""


@dataclass(frozen=True)
class Tally:
    """How many cells ended how; ``missing`` have no record, since their run failed or the study was stopped."""

    ok: int
    withheld: int
    failed: int
    missing: int

    @classmethod
    def of(cls, study: Study, records: Mapping[str, RunCell | AttackCell]) -> Tally:
        """Count a study's cells."""
        ends = [records[cell].status if cell in records else "missing" for cell in study.cells]
        return cls(*(ends.count(end) for end in ("ok", "withheld", "failed", "missing")))

    @property
    def total(self) -> int:
        """All cells."""
        return self.ok + self.withheld + self.failed + self.missing


def run_study(
    study: Study,
    directory: Path,
    *,
    on_event: OnEvent = lambda _name, _fields: None,
    retry_failed: bool = False,
    after_run: Callable[[], None] = lambda: None,
) -> Tally:
    """Measure every cell that is not yet; records go to ``results.jsonl`` as they are made.

    Args:
        study: what is to be measured.
        directory: see `veiltune.evaluation.studies.output`.
        on_event: told of the sessions' progress, and of ``cell`` and ``cell_ended``.
        retry_failed: try cells again that failed before.
        after_run: called when a run and its attacks are done.

    Raises:
        KeyboardInterrupt: it was stopped; what was recorded stays.
        DataError: the records were altered.
    """
    work = _Work(study, directory, on_event)
    for run in study.runs:
        if work.measure(run, retry_failed=retry_failed):
            after_run()
    return Tally.of(study, work.records)


@dataclass
class _Work:
    """One call's progress through a study."""

    study: Study
    directory: Path
    on_event: OnEvent
    records: Records = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.directory / RECORDS
        self.records = {record.cell: record for record in read_study(path)} if path.is_file() else {}

    def measure(self, run: RunPlan, *, retry_failed: bool) -> bool:
        """Whatever of a run and its attacks is still to be done; whether there was anything."""
        pending = tuple(each for each in run.attacks if self._is_due(each.cell, retry_failed=retry_failed))
        is_due = self._is_due(run.cell, retry_failed=retry_failed)
        if is_due:
            self._run(run, pending)
        if self.records[run.cell].status != "ok":
            pending = ()  # there is nothing to attack
        if pending:
            self._attack_all(run, pending)
        if not self.study.keep_transcripts:
            self._discard(run)
        return is_due or bool(pending)

    def _is_due(self, cell: str, *, retry_failed: bool) -> bool:
        record = self.records.get(cell)
        return record is None or (retry_failed and record.status == "failed")

    # --- runs ---------------------------------------------------------------------------------------------------------

    def _run(self, run: RunPlan, pending: Sequence[AttackPlan]) -> None:
        self._announce("run", run.cell, run.title)
        begin = time.perf_counter()
        config = _configured(run.config, self._place(run), () if run.recorded else _observers(pending))
        ended: dict[str, Any]
        try:
            ended = {"status": "ok", "result": self._session(config)}
        except Exception as error:  # noqa: BLE001 - it is recorded, and the study goes on
            ended = {"status": "failed", "error": self._told(error, run.cell)}
        options = flat(run.config.design_options.get(run.config.design, {}))
        self._record(RunCell(**_heading(run), **_measured(run.cell, begin), options=options, **ended), run.title)

    def _session(self, config: Config) -> RunResult:
        """One tuning session in a fresh directory; its record is written last, and so says that it was finished."""
        output = Path(config.output)
        _remove(output)
        outcome = run_session(config, Job(verb="tune"), on_event=self.on_event)
        if outcome.interrupted:
            raise KeyboardInterrupt
        result = result_of(config, outcome)
        write_result(output / RESULT, result)
        return result

    def _place(self, run: RunPlan, *, recorded: bool = False) -> Path:
        name = f"{run.config.design}-{run.cell}" + ("-recorded" if recorded else "")
        return self.directory / "runs" / name

    def _discard(self, run: RunPlan) -> None:
        """Nothing is to be read of the run's transcripts any more: all its attacks are done, or it failed."""
        for name in PRIVATE:
            _remove(self._place(run) / name)
        _remove(self._place(run, recorded=True))

    # --- attacks ------------------------------------------------------------------------------------------------------

    def _attack_all(self, run: RunPlan, pending: Sequence[AttackPlan]) -> None:
        place = self._place(run, recorded=run.recorded is not None)
        try:
            self._require_transcripts(run, place, _observers(pending))
        except Exception as error:  # noqa: BLE001 - as above
            for each in pending:
                told = f"the run could not be recorded: {self._told(error, each.cell)}"
                self._record(_attack_cell(run, each, time.perf_counter(), status="failed", error=told), _title(each))
            return
        for each in pending:
            self._attack(run, each, place)

    def _require_transcripts(self, run: RunPlan, place: Path, observers: tuple[str, ...]) -> None:
        """Repeat the run, recorded, unless a finished one is there with what these observers saw."""
        is_whole = (place / RESULT).is_file()
        if is_whole and all((place / "transcript" / f"{each}.vtt").is_file() for each in observers):
            return
        self.on_event("saying", {"line": "a run to be attacked"})
        self._session(_configured(run.recorded or run.config, place, observers))

    def _attack(self, run: RunPlan, plan: AttackPlan, place: Path) -> None:
        self._announce("attack", plan.cell, f"{run.title}: {_title(plan)}")
        begin = time.perf_counter()
        try:
            found = attack_run(
                place,
                plan.attack,
                phase=plan.phase,
                moment=plan.moment,
                limit=plan.limit,
                seed=run.config.seed,
                corpus=plan.corpus,
                say=lambda line: self.on_event("saying", {"line": line}),
            )
        except Exception as error:  # noqa: BLE001 - as above
            # it fits the design, so a bare UserError says that there was too little to attack
            is_withheld = isinstance(error, ExactnessError) or type(error) is UserError
            ended: dict[str, Any] = {"status": "withheld" if is_withheld else "failed"}
            ended["error"] = self._told(error, plan.cell)
        else:
            names = AttackFigure.model_fields
            figures = {each.metric: {name: getattr(each, name) for name in names} for each in found.findings}
            samples = [TextSample(truth=_cut(s.truth), found=_cut(s.found)) for s in found.samples[:SAMPLES]]
            ended = {"status": "ok", "figures": figures, "samples": samples, "nothing": _counted(found)}
        gc.collect()  # the model that was attacked, before the next one is loaded
        self._record(_attack_cell(run, plan, begin, **ended), f"{run.title}: {_title(plan)}")

    # --- records ------------------------------------------------------------------------------------------------------

    def _record(self, record: RunCell | AttackCell, title: str) -> None:
        append_record(self.directory / RECORDS, record)
        self.records[record.cell] = record
        ended = {"title": title, "status": record.status, "error": record.error, "seconds": record.seconds}
        self.on_event("cell_ended", ended)

    def _told(self, error: Exception, cell: str) -> str:
        """An error of ours in its own words; of another only its kind, for its text may hold data. The rest is in the log."""
        if isinstance(error, VeiltuneError):
            return error.message
        path = self.directory / "log" / f"{cell}.txt"
        write_text(path, "".join(traceback.format_exception(error)))
        return f"internal error: {type(error).__name__} (log/{path.name})"

    def _announce(self, kind: str, cell: str, title: str) -> None:
        cells = self.study.cells
        fields = {"kind": kind, "title": title, "number": cells.index(cell) + 1, "total": len(cells)}
        self.on_event("cell", {**fields, "left_seconds": self._left_seconds()})

    def _left_seconds(self) -> float | None:
        """What the cells without a record will take, by those of their kind that have one; ``None``: nothing to go by."""
        spent: dict[str, list[float]] = {}
        for record in self.records.values():
            for key in _kinds(record):
                spent.setdefault(key, []).append(record.seconds)
        left = 0.0
        for run in self.study.runs:
            open_cells = [] if run.cell in self.records else [("run", run.config.design)]
            open_cells += [("attack", each.attack.name) for each in run.attacks if each.cell not in self.records]
            for kind, name in open_cells:
                known = spent.get(f"{kind} {name}") or spent.get(kind)
                if known is None:
                    return None
                left += mean(known)
        return left


def _kinds(record: RunCell | AttackCell) -> tuple[str, str]:
    name = record.design if isinstance(record, RunCell) else record.attack
    return record.kind, f"{record.kind} {name}"


def _observers(plans: Sequence[AttackPlan]) -> tuple[str, ...]:
    """Whose transcripts these attacks read."""
    return tuple(sorted({each.attack.observer for each in plans}))


def _configured(config: Config, output: Path, observers: tuple[str, ...]) -> Config:
    session = config.session.model_copy(update={"record": observers})
    return config.model_copy(update={"output": output, "session": session})


def _heading(run: RunPlan) -> dict[str, Any]:
    config = run.config
    return {
        "design": config.design,
        "setting": run.setting,
        "model": config.model,
        "task": run.task,
        "seed": config.seed,
    }


def _measured(cell: str, begin: float) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"cell": cell, "seconds": time.perf_counter() - begin, "measured_at": now}


def _attack_cell(run: RunPlan, plan: AttackPlan, begin: float, **ended: Any) -> AttackCell:
    return AttackCell(
        **_heading(run),
        **_measured(plan.cell, begin),
        run=run.cell,
        attack=plan.attack.name,
        attack_setting=plan.attack.setting,
        moment=plan.moment,
        observer=plan.attack.observer,
        knows=plan.attack.knows,
        phase=plan.phase,
        **ended,
    )


def _title(plan: AttackPlan) -> str:
    setting = f" ({plan.attack.setting})" if plan.attack.setting else ""
    phase = "" if plan.phase in {None, "tuning"} else f", {told_phase(plan.phase)}"
    return f"{plan.attack.name}{setting}, {plan.moment} texts{phase}"


def _counted(found: Attacked) -> NothingCrossed | None:
    nothing = found.nothing
    if nothing is None:
        return None
    return NothingCrossed(passes=nothing.num_passes, others=nothing.num_others, returned=nothing.num_returned)


def _cut(text: str) -> str:
    return text if len(text) <= SAMPLE_LETTERS else f"{text[:SAMPLE_LETTERS]}…"


def _remove(path: Path) -> None:
    """Delete a directory of ours. Moved first: parties of a session that was killed may still be writing into it."""
    stale = path.with_name(f".removed-{path.name}")
    shutil.rmtree(stale, ignore_errors=True)
    if path.exists():
        path.rename(stale)
        shutil.rmtree(stale, ignore_errors=True)
