"""``veiltune inspect`` as people run it: a model before anything is sent, or a finished run and what it revealed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from veiltune.display import console, sees_list
from veiltune.errors import UserError
from veiltune.evaluation import RESULT
from veiltune.evaluation.disclosure import as_json as disclosed
from veiltune.evaluation.disclosure import statement
from veiltune.evaluation.inspection import inspect_model
from veiltune.models.ancestry import AncestorCheck, check_ancestor
from veiltune.models.family import Placement
from veiltune.models.sources import resolve_model
from veiltune.report import inspect_table
from veiltune.results import read_result, to_json


def run_inspect(
    what: str,
    *,
    placement: Placement | None = None,
    enclave_layers: Sequence[int] = (),
    ancestors: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Show how a model would be divided, or what a run revealed; returns the exit code.

    Args:
        what: a model source, or a run's output directory.
        placement: of `obfuscatune`; both if ``None``.
        enclave_layers: of `veil`.
        ancestors: public models that its weights are held against.
        as_json: print one object on stdout.

    Raises:
        UserError: neither, or options of a model with a run.
    """
    if (Path(what) / RESULT).is_file():
        if placement is not None or enclave_layers or ancestors:
            raise UserError(
                f"{what!r} is a run: these options are for a model", hint="give a model source, or no option"
            )
        return _inspect_run(Path(what), shown_as_json=as_json)
    return _inspect_model(what, placement, enclave_layers, ancestors, shown_as_json=as_json)


def _inspect_run(run: Path, *, shown_as_json: bool) -> int:
    result = read_result(run / RESULT)
    if shown_as_json:
        print(to_json(disclosed(result)))  # noqa: T201 - asked for
    else:
        console().print(statement(result))
    return 0


def _inspect_model(
    model: str,
    placement: Placement | None,
    enclave_layers: Sequence[int],
    ancestors: Sequence[str],
    *,
    shown_as_json: bool,
) -> int:
    def say(line: str) -> None:
        print(line, file=sys.stderr)  # noqa: T201 - progress

    found = inspect_model(model, placement, enclave_layers=enclave_layers, progress=say)
    checks: list[AncestorCheck] = []
    for source in ancestors:
        say(f"holding {model} against {source}")
        checks.append(check_ancestor(resolve_model(model, progress=say), resolve_model(source, progress=say)))
    if shown_as_json:
        against = {"ancestors": [check.as_json() for check in checks]} if checks else {}
        print(to_json({**found.as_json(), **against}))  # noqa: T201 - asked for
        return 0
    screen = console()
    screen.print(inspect_table(model, found.places, found.counts))
    screen.print(sees_list(found))
    for check in checks:
        screen.print(ancestor_table(model, check))
    return 0


def ancestor_table(model: str, check: AncestorCheck) -> Table:
    """Every key's alignment with one public model."""
    table = Table(title=Text(f"{model} and {check.ancestor}"), caption=Text(str(check)), title_style="bold")
    for name in ("key", "residual", "similarity", "by chance", "above chance", "error of recovered weights"):
        table.add_column(name, justify="left" if name == "key" else "right")
    for key, found in check.keys.items():
        style = "bold red" if found.is_aligned else ""
        cells = (found.residual, found.similarity, found.chance, found.excess)
        table.add_row(key, *(f"{cell:.3f}" for cell in cells), f"{100 * found.weight_error:.1f}%", style=style)
    return table
