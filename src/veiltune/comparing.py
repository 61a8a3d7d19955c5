"""The comparison as people run it: the study's file, what it needs fetched, the display, the report, and how to go on."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from veiltune.display import Display, Fields, console
from veiltune.errors import VeiltuneError
from veiltune.evaluation.studies import RECORDS, Study, Tally, open_output, plan_study, read_study_file, run_study
from veiltune.evaluation.studies.grammar import StudyFile
from veiltune.models.packages import ensure_package
from veiltune.study_records import AttackCell, RunCell, read_study

INTERRUPTED = 130
Writer = Callable[..., list[Path]]


class StudyDisplay(Display):
    """A `Display` of one cell after another, with how far the study has come above it."""

    _where = _doing = ""

    def _on_cell(self, fields: Fields) -> None:
        for task in self._tasks.values():
            self._progress.remove_task(task)
        self._tasks.clear()
        self._last_line.clear()
        self._simulated, self._border = False, ""
        left = fields["left_seconds"]
        rest = "" if left is None else f", about {_duration(left)} left"
        self._where = f"cell {fields['number']} of {fields['total']}{rest}"
        self._doing = fields["title"]
        self._say("cell", f"{self._where}: {self._doing}", now=True)

    def _on_saying(self, fields: Fields) -> None:
        self._doing = fields["line"]
        self._say("saying", fields["line"], now=True)

    def _on_cell_ended(self, fields: Fields) -> None:
        why = f": {fields['error']}" if fields["error"] else ""
        self.note(f"{fields['status']:>8} {_duration(fields['seconds']):>8}  {fields['title']}{why}")

    def _render(self) -> Group:
        title, *rest = super()._render().renderables
        return Group(title, *(Text(line) for line in (self._where, self._doing) if line), *rest)


def run_compare(study: str, output: Path | None, *, overwrite: bool, retry_failed: bool, as_json: bool) -> int:
    """Measure a study's cells that are not measured yet, and report on all of them; returns the exit code.

    Args:
        study: path of a TOML file, or the name of one that comes with the package.
        output: directory (default: ``veiltune-compare-NAME``).
        overwrite: forget what was measured there before.
        retry_failed: try cells again that failed before.
        as_json: print one object on stdout.

    Raises:
        UserError: the study or the directory cannot be used.
    """
    screen = console()
    with StudyDisplay(screen, f"reading {study}") as display:
        file = read_study_file(study)
        _fetch(file, display)
        plan = plan_study(file)
    directory = output or Path(f"veiltune-compare-{plan.name}")
    again = ["veiltune", "compare", study, *(["--output", str(output)] if output else [])]
    with open_output(directory, plan, overwrite=overwrite):
        comparison = _Comparison(plan, directory, shlex.join(again))
        with StudyDisplay(screen, f"comparing: {plan.title}") as display:
            try:
                tally = run_study(
                    plan,
                    directory,
                    on_event=display,
                    retry_failed=retry_failed,
                    after_run=lambda: comparison.report_early(display),
                )
            except KeyboardInterrupt:
                display.stop()
                return comparison.interrupted(as_json=as_json)
            comparison.report()
    return comparison.ended(tally, as_json=as_json)


def _fetch(file: StudyFile, display: Display) -> None:
    for source in file.sources:
        kind, _, rest = source.partition(":")
        if kind == "package":
            ensure_package(rest.partition("/")[0], progress=display.note)


@dataclass
class _Comparison:
    """One comparison's words and files at its end."""

    plan: Study
    directory: Path
    again: str
    written: list[Path] | None = None

    @property
    def records(self) -> list[RunCell | AttackCell]:
        path = self.directory / RECORDS
        return read_study(path) if path.is_file() else []

    def report(self) -> None:
        """Write the report of what there is."""
        from veiltune.report.study import write_study_report

        self.written = write_study_report(self.records, self.directory, title=self.plan.title)

    def report_early(self, display: Display) -> None:
        """The same on the way, where trouble with it must not end the study."""
        try:
            self.report()
        except Exception as error:  # noqa: BLE001 - the report at the end says it
            display.note(f"no report yet: {type(error).__name__}")

    def interrupted(self, *, as_json: bool) -> int:
        """Say how to go on."""
        tally = Tally.of(self.plan, {record.cell: record for record in self.records})
        done = tally.total - tally.missing
        print(f"stopped after {done} of {tally.total} cells; go on with: {self.again}", file=sys.stderr)  # noqa: T201
        if as_json:
            sys.stdout.write(json.dumps({"interrupted": True, **asdict(tally), "resume": self.again}) + "\n")
        return INTERRUPTED

    def ended(self, tally: Tally, *, as_json: bool) -> int:
        """Say what came of it; 0 unless a cell failed."""
        failed = [record for record in self.records if record.status == "failed"]
        error = _failure(tally, self.again)
        if as_json:
            told = {} if error is None else {"error": error.message, "hint": error.hint}
            shown: dict[str, Any] = {"study": self.plan.name, "output": str(self.directory), **asdict(tally)}
            shown["report"] = [str(path) for path in self.written or []]
            shown["failures"] = [record.model_dump(exclude={"result", "figures", "samples"}) for record in failed]
            sys.stdout.write(json.dumps({**told, **shown}) + "\n")
        lines = [f"{tally.total} cells: {tally.ok} ok, {tally.withheld} withheld, {tally.failed} failed"]
        lines[0] += f", {tally.missing} missing" if tally.missing else ""
        lines += [f"written: {path}" for path in [self.directory / RECORDS, *(self.written or [])]]
        if error is not None:
            lines += [f"error: {error.message}", f"hint: {error.hint}"]
        print("\n".join(lines), file=sys.stderr)  # noqa: T201
        return 0 if error is None else error.exit_code


def _failure(tally: Tally, again: str) -> VeiltuneError | None:
    if not tally.failed:
        return None
    without = f", and {tally.missing} are missing for it" if tally.missing else ""
    return VeiltuneError(
        f"{tally.failed} of {tally.total} cells failed{without}", hint=f"to try them again: {again} --retry-failed"
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
