"""Result records side by side, as a terminal table and as Markdown.

The one quotient that may be formed is of two recorded medians, where no ratio was recorded; it is labelled as such. A
simulated enclave is named wherever a figure of its run is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from veiltune.errors import UserError
from veiltune.results import Measurement, RunResult, Spread

Results = Mapping[str, RunResult]
"""Records by the label that a person knows them by; the order is the order of columns."""
Row = tuple[str, list[str]]

NOTHING = "-"
SIMULATED = "SIMULATED: protects nothing"
SIMULATED_NOTE = "SIMULATED enclave: no hardware protected it, so this run protected nothing from its host."

_ERRORS = {"logits": "logits", "loss": "loss", "gradients": "gradients", "adapter": "adapter after tuning"}


def comparison_table(results: Results) -> Table:
    """Runs side by side: accuracy, loss, exactness, cost, what the enclave holds, and reservations.

    Raises:
        UserError: there are no results.
    """
    rows = comparison_rows(results)
    table = Table(title=Text(title(results)), caption=caption(results), caption_style="bold red", title_style="bold")
    table.add_column("")
    for label in results:
        table.add_column(Text(label), justify="right")
    for name, cells in rows:
        table.add_row(Text(name), *(Text(cell, style=_style(cell)) for cell in cells))
    return table


def comparison_markdown(results: Results) -> str:
    """The same as a Markdown table, with each run's generated answers below it.

    Raises:
        UserError: there are no results.
    """
    rows = comparison_rows(results)
    lines = [
        f"**{markdown_text(title(results))}**",
        "",
        markdown_row(["", *results]),
        "|---" + "|--:" * len(results) + "|",
        *(markdown_row([name, *cells]) for name, cells in rows),
    ]
    if note := caption(results):
        lines += ["", f"**{note}**"]
    for label, result in results.items():
        for answer in result.answers:
            lines += ["", f"*{markdown_text(label)}*, asked:", "", *_indented(answer.prompt), "", "answered:", ""]
            lines += _indented(answer.text)
    return "\n".join(lines) + "\n"


def comparison_rows(results: Results) -> list[Row]:
    """The comparison as plain text: a name and one cell per result. Rows that no result has are left out.

    Raises:
        UserError: there are no results.
    """
    if not results:
        raise UserError("there are no results to compare", hint="give at least one result.json")
    rows = [
        *_utility_rows(results),
        _row("validation loss", results, lambda r: f"{r.validation_loss[-1][1]:.4f}" if r.validation_loss else None),
        _row("last training loss", results, lambda r: f"{r.loss[-1]:.4f}" if r.loss else None),
        *(_row(f"error in {title}", results, lambda r, name=name: _error(r, name)) for name, title in _ERRORS.items()),
        _row(
            "distance correlation, last step", results, lambda r: f"{r.correlation[-1]:.3f}" if r.correlation else None
        ),
        _row("emulator", results, _emulator),
        _row("seconds a step", results, lambda r: spread_text(r.cost.seconds_per_step)),
        ("ratio to local", [_ratio(result, results) or NOTHING for result in results.values()]),
        _row("bytes a step", results, lambda r: bytes_text(r.cost.bytes_per_step)),
        _row("crossings a step", results, lambda r: _number(r.cost.crossings_per_step)),
        _row("largest memory of a party", results, _peak),
        _row("parameters in the enclave", results, lambda r: percent(r.cost.enclave.param_share)),
        _row("forward FLOPs in the enclave", results, lambda r: percent(r.cost.enclave.flop_share)),
        _row("time in the enclave", results, lambda r: percent(r.cost.enclave.seconds_share)),
        _row("parameters revealed to", results, _revealed),
        _row("enclave", results, _enclave),
        _row("keys", results, lambda r: "REPRODUCIBLE from a seed" if r.labels.reproducible_secrets else None),
        _row("bfloat16", results, lambda r: r.labels.bfloat16),
    ]
    return [row for row in rows if any(cell != NOTHING for cell in row[1])]


def _row(name: str, results: Results, cell: Callable[[RunResult], str | None]) -> Row:
    return name, [cell(result) or NOTHING for result in results.values()]


def _utility_rows(results: Results) -> list[Row]:
    before = dict.fromkeys(name for result in results.values() for name in result.utility_before)
    emulated = dict.fromkeys(name for result in results.values() for name in result.utility_emulator)
    after = dict.fromkeys(name for result in results.values() for name in result.utility)
    return [
        *(_row(f"{m}, zero-shot", results, lambda r, m=m: _measured(r.utility_before.get(m))) for m in before),
        *(
            _row(f"{m}, on the emulator", results, lambda r, m=m: _measured(r.utility_emulator.get(m)))
            for m in emulated
        ),
        *(_row(m, results, lambda r, m=m: _measured(r.utility.get(m))) for m in after),
    ]


def _measured(figure: Measurement | None) -> str | None:
    if figure is None:
        return None
    if figure.ci95 is None:
        return f"{figure.value:.3f} n={figure.n}"
    low, high = figure.ci95
    return f"{figure.value:.3f} [{low:.3f}, {high:.3f}] n={figure.n}"


def _error(result: RunResult, name: str) -> str | None:
    error = getattr(result.exactness, name)
    if error is None:
        return None
    bound = {str(key): value for key, value in result.exactness.bounds.items()}.get(name)
    if bound is None:
        return f"{error:.1e}"
    return f"{error:.1e} {'EXCEEDS' if name in result.exactness.exceeded() else '≤'} {bound:.1e}"


def spread_text(spread: Spread | None, unit: str = "") -> str | None:
    """Median, and the 10th to the 90th percentile."""
    if spread is None:
        return None
    return f"{spread.median:.3g}{unit} ({spread.p10:.3g} to {spread.p90:.3g})"


def _ratio(result: RunResult, results: Results) -> str | None:
    """A recorded ratio, else the quotient of two recorded medians, which says what it is."""
    if result.cost.step_ratio is not None:
        return spread_text(result.cost.step_ratio, "x")
    plain = next((r for r in results.values() if r.design == "local" and r.cost.seconds_per_step is not None), None)
    if plain is None or plain.cost.seconds_per_step is None or result.cost.seconds_per_step is None:
        return None
    if result is plain:
        return "1x"
    return f"{result.cost.seconds_per_step.median / plain.cost.seconds_per_step.median:.2f}x (of medians)"


def bytes_text(num_bytes: float | None) -> str | None:
    """Bytes in decimal units."""
    return None if num_bytes is None else decimal(round(num_bytes))


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def percent(share: float | None) -> str | None:
    """A share in percent; a small one is not shown as none."""
    if share is None:
        return None
    return "<0.1%" if 0 < share < 0.0005 else f"{100 * share:.1f}%"


def _peak(result: RunResult) -> str | None:
    if not result.cost.peak_rss:
        return None
    party, peak = max(result.cost.peak_rss.items(), key=lambda item: item[1])
    return f"{decimal(peak)} ({party})"


def _revealed(result: RunResult) -> str | None:
    return ", ".join(f"{who} {percent(share)}" for who, share in result.cost.revealed_param_share.items()) or None


def _emulator(result: RunResult) -> str | None:
    found = result.emulator
    if found is None:
        return None
    return (
        f"{found.kind}: {found.layers[1]} of {found.layers[0]} layers, {percent(found.byte_share)} of the trunk's bytes"
    )


def _enclave(result: RunResult) -> str | None:
    if result.simulated_enclave:
        return SIMULATED
    return "not simulated" if result.cost.enclave.param_share else None


def title(results: Results) -> str:
    """The models the runs are of."""
    return ", ".join(dict.fromkeys(result.model for result in results.values()))


def caption(results: Results) -> str | None:
    """The reservation that belongs under every figure of these runs."""
    simulated = [label for label, result in results.items() if result.simulated_enclave]
    return f"{', '.join(simulated)}: {SIMULATED_NOTE}" if simulated else None


def _style(cell: str) -> str:
    loud = cell == SIMULATED or "EXCEEDS" in cell or "REPRODUCIBLE" in cell
    return "bold red" if loud else "dim" if cell == NOTHING else ""


def markdown_text(text: str) -> str:
    """Text that shows as it is inside a Markdown table."""
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def markdown_row(cells: Iterable[str]) -> str:
    """A line of a Markdown table whose cells show as they are."""
    return "| " + " | ".join(markdown_text(cell) for cell in cells) + " |"


def _indented(text: str) -> list[str]:
    return [f"    {line}".rstrip() for line in text.splitlines()] or ["    "]
