"""What every benchmark shares: its options, the file it leaves, ratios with their spread, and timing by turns.

A benchmark is a module with a ``measure(quick) -> rows`` and the last lines::

    if __name__ == "__main__":
        run("NAME", __doc__, measure)

``benchmarks/results/NAME.json`` is ``{"schema": 1, "command": …, "machine": …, "versions": …, "rows": [ … ]}``. A quick
run never touches it: it prints, and writes only where ``--output`` says.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from veiltune.results import Spread, machine, to_json, versions, write_json

SCHEMA = 1
LOG_WIDTH = 200
RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]
Times = dict[str, list[float]]


def run(
    name: str,
    description: str,
    measure: Callable[[bool], list[Row]],
    argv: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Parse the options, measure, write and show; returns the record.

    Args:
        name: of the benchmark, hence of its file.
        description: its docstring; the first line is the help text.
        measure: given whether to be quick, returns the rows.
        argv: command line, for tests.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=description.strip().splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="measure little, keep nothing unless --output is given")
    parser.add_argument("--json", action="store_true", help="print the record as one JSON object on stdout")
    parser.add_argument("--output", type=Path, help=f"file to write instead of benchmarks/results/{name}.json")
    options = parser.parse_args(argv)
    result = record(name, measure(options.quick), quick=options.quick)
    path = options.output or (None if options.quick else RESULTS / f"{name}.json")
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=LOG_WIDTH)
    if path is not None:
        write_json(path, result)
    if options.json:
        print(to_json(result))
    else:
        console.print(table(name, result["rows"]))
    console.print(Text("nothing was written (a quick run)" if path is None else f"written: {path}", style="dim"))
    return result


def record(name: str, rows: list[Row], *, quick: bool = False) -> dict[str, Any]:
    """A benchmark's file as a JSON object. The command is the one that makes it again on any machine."""
    return {
        "schema": SCHEMA,
        "command": f"python -m benchmarks.{name}{' --quick' if quick else ''}",
        "machine": machine().model_dump(mode="json"),
        "versions": versions(),
        "rows": rows,
    }


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """``{"median", "p10", "p90", "n"}`` of repeated measurements.

    Raises:
        ValueError: there are none.
    """
    return Spread.of(values).model_dump()


def ratios(times: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, float | int]]:
    """Each task's time over ``base``'s of the same round, summarised; ``base`` itself is left out.

    The quotient is formed within a round, where both saw the same machine, and only then summarised.
    """
    return {
        name: summary([value / plain for value, plain in zip(values, times[base], strict=True)])
        for name, values in times.items()
        if name != base
    }


def alternate(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Time tasks by turns, so that all see the same drift of the machine: wall seconds by task, one for each round.

    Every other round runs backwards, so that no task always follows the same one.

    Args:
        tasks: what to time, by name.
        rounds: timed rounds.
        warmup: rounds before those, not timed.
        clock: a monotonic clock in seconds.

    Raises:
        ValueError: fewer than one round, or nothing to time.
    """
    if rounds < 1 or not tasks:
        raise ValueError(f"cannot time {len(tasks)} tasks in {rounds} rounds")
    for _ in range(warmup):
        for task in tasks.values():
            task()
    times: Times = {name: [] for name in tasks}
    for number in range(rounds):
        order = list(tasks.items())
        for name, task in order if number % 2 == 0 else reversed(order):
            start = clock()
            task()
            times[name].append(clock() - start)
    return times


def table(title: str, rows: Sequence[Row]) -> Table:
    """Rows for people: one column per key, in order of first appearance. What is the same in all goes below."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = [key for key in keys if any(row.get(key, ...) != rows[0].get(key) for row in rows)] or keys
    same = {key: rows[0][key] for key in keys if key not in columns}
    caption = Text(", ".join(f"{key} = {_cell(value)}" for key, value in same.items()))
    made = Table(title=Text(title), caption=caption)
    for column in columns:
        made.add_column(Text(column), justify="right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(_cell(row.get(column))) for column in columns))
    return made


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping) and {"median", "p10", "p90"} <= value.keys():
        return f"{value['median']:.3g} ({value['p10']:.3g} to {value['p90']:.3g})"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
