"""Result records for people: terminal tables, Markdown, a plot of losses. Nothing is measured or recomputed here.

The one quotient that may be formed is of two recorded medians, where no ratio was recorded; it is labelled as such. A
simulated enclave is named wherever a figure of its run is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from veiltune.errors import UserError
from veiltune.models.accounting import Shares, TensorPlace
from veiltune.results import Measurement, RunResult, Spread

Results = Mapping[str, RunResult]
"""Records by the label that a person knows them by; the order is the order of columns."""
Row = tuple[str, list[str]]

NOTHING = "-"
SIMULATED = "SIMULATED: protects nothing"
SIMULATED_NOTE = "SIMULATED enclave: no hardware protected it, so this run protected nothing from its host."

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_ERRORS = {"logits": "logits", "loss": "loss", "gradients": "gradients", "adapter": "adapter after tuning"}


# --- comparison -------------------------------------------------------------------------------------------------------


def comparison_table(results: Results) -> Table:
    """Runs side by side: accuracy, loss, exactness, cost, what the enclave holds, and reservations.

    Raises:
        UserError: there are no results.
    """
    rows = comparison_rows(results)
    table = Table(title=Text(_title(results)), caption=_caption(results), caption_style="bold red", title_style="bold")
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
        f"**{_markdown(_title(results))}**",
        "",
        _markdown_row(["", *results]),
        "|---" + "|--:" * len(results) + "|",
        *(_markdown_row([name, *cells]) for name, cells in rows),
    ]
    if note := _caption(results):
        lines += ["", f"**{note}**"]
    for label, result in results.items():
        for answer in result.answers:
            lines += ["", f"*{_markdown(label)}*, asked:", "", *_indented(answer.prompt), "", "answered:", ""]
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
        _row("seconds a step", results, lambda r: _spread(r.cost.seconds_per_step)),
        ("ratio to local", [_ratio(result, results) or NOTHING for result in results.values()]),
        _row("bytes a step", results, lambda r: _bytes(r.cost.bytes_per_step)),
        _row("crossings a step", results, lambda r: _number(r.cost.crossings_per_step)),
        _row("largest memory of a party", results, _peak),
        _row("parameters in the enclave", results, lambda r: _percent(r.cost.enclave.param_share)),
        _row("forward FLOPs in the enclave", results, lambda r: _percent(r.cost.enclave.flop_share)),
        _row("time in the enclave", results, lambda r: _percent(r.cost.enclave.seconds_share)),
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
    after = dict.fromkeys(name for result in results.values() for name in result.utility)
    return [
        *(_row(f"{m}, zero-shot", results, lambda r, m=m: _measured(r.utility_before.get(m))) for m in before),
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


def _spread(spread: Spread | None, unit: str = "") -> str | None:
    if spread is None:
        return None
    return f"{spread.median:.3g}{unit} ({spread.p10:.3g} to {spread.p90:.3g})"


def _ratio(result: RunResult, results: Results) -> str | None:
    """A recorded ratio, else the quotient of two recorded medians, which says what it is."""
    if result.cost.step_ratio is not None:
        return _spread(result.cost.step_ratio, "x")
    plain = next((r for r in results.values() if r.design == "local" and r.cost.seconds_per_step is not None), None)
    if plain is None or plain.cost.seconds_per_step is None or result.cost.seconds_per_step is None:
        return None
    if result is plain:
        return "1x"
    return f"{result.cost.seconds_per_step.median / plain.cost.seconds_per_step.median:.2f}x (of medians)"


def _bytes(num_bytes: float | None) -> str | None:
    return None if num_bytes is None else decimal(round(num_bytes))


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _percent(share: float | None) -> str | None:
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
    return ", ".join(f"{who} {_percent(share)}" for who, share in result.cost.revealed_param_share.items()) or None


def _enclave(result: RunResult) -> str | None:
    if result.simulated_enclave:
        return SIMULATED
    return "not simulated" if result.cost.enclave.param_share else None


def _title(results: Results) -> str:
    return ", ".join(dict.fromkeys(result.model for result in results.values()))


def _caption(results: Results) -> str | None:
    simulated = [label for label, result in results.items() if result.simulated_enclave]
    return f"{', '.join(simulated)}: {SIMULATED_NOTE}" if simulated else None


def _style(cell: str) -> str:
    loud = cell == SIMULATED or "EXCEEDS" in cell or "REPRODUCIBLE" in cell
    return "bold red" if loud else "dim" if cell == NOTHING else ""


def _markdown(text: str) -> str:
    """Text that shows as it is inside a Markdown table."""
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_markdown(cell) for cell in cells) + " |"


def _indented(text: str) -> list[str]:
    return [f"    {line}".rstrip() for line in text.splitlines()] or ["    "]


# --- inspect ----------------------------------------------------------------------------------------------------------


def inspect_table(
    model: str,
    places: Mapping[str, Sequence[TensorPlace]],
    counts: Mapping[str, Shares],
    sees: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
) -> Table:
    """How a model would be cut: which kind of tensor lives where under each design, the shares, and who sees what.

    Args:
        model: as the user named it.
        places: from `accounting.tensor_placement`, by the design's label (say "obfuscatune compact").
        counts: from `accounting.shares`, by the same labels.
        sees: what each observer sees, by label and observer.

    Raises:
        UserError: there is no design to show, or ``counts`` has other labels than ``places``.
    """
    if not places or set(places) != set(counts):
        raise UserError(
            f"cannot show placements of {sorted(places)} with counts of {sorted(counts)}",
            hint="give both for each design",
        )
    first = next(iter(counts.values()))
    table = Table(title=Text(f"{model}: {first.num_parameters:,} parameters"), title_style="bold", show_lines=False)
    table.add_column("")
    table.add_column("parameters", justify="right")
    for label in places:
        table.add_column(Text(label))
    for kind, number in _by_kind(next(iter(places.values()))).items():
        table.add_row(kind, f"{number:,}", *(Text(_whereabouts(held, kind)) for held in places.values()))
    table.add_section()
    for name, cell in _count_rows(first).items():
        table.add_row(name, "", *(cell(counts[label]) for label in places))
    table.add_section()
    for observer in dict.fromkeys(who for label in places for who in (sees or {}).get(label, {})):
        cells = ["\n".join((sees or {}).get(label, {}).get(observer, ())) or NOTHING for label in places]
        table.add_row(Text(f"the {observer} sees"), "", *(Text(cell) for cell in cells))
    return table


def _by_kind(places: Sequence[TensorPlace]) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for place in places:
        numbers[place.kind] = numbers.get(place.kind, 0) + place.num_parameters
    return numbers


def _whereabouts(places: Sequence[TensorPlace], kind: str) -> str:
    """Who holds the tensors of a kind, and in what form, if that is not an enclave."""
    found = [
        place.holder
        if place.holder == "enclave"
        else f"{place.holder}, {'masked' if place.is_masked else 'in the clear'}"
        for place in places
        if place.kind == kind
    ]
    return "; ".join(dict.fromkeys(found)) or NOTHING


def _count_rows(first: Shares) -> dict[str, Callable[[Shares], str]]:
    """The lower half of `inspect_table`: names and how to write each."""
    batch = f"{first.batch}x{first.length}"
    return {
        "parameters in the enclave": lambda s: str(_percent(s.param_share)),
        "parameters the host has in the clear": lambda s: str(_percent(s.revealed_param_share)),
        f"forward FLOPs in the enclave, {batch}": lambda s: str(_percent(s.flop_share)),
        "  of these by maskings, dense keys": lambda s: str(_percent(s.mask_flops / s.flops)),
        "numbers in the enclave's keys": lambda s: f"{s.key_elements:,}",
        "crossings of a forward pass": lambda s: f"{s.crossings:,}",
        "LoRA numbers, per rank": lambda s: f"{s.lora_parameters_per_rank:,}",
    }


# --- plots ------------------------------------------------------------------------------------------------------------


def plot_losses(results: Results, path: Path) -> None:
    """Draw the loss of each step of each run as a PNG, and evaluations on held-out data as diamonds of the same colour.

    Curves that coincide stay visible: each is thinner than the one below it, and dashed differently. The colours are
    Okabe and Ito's, which colour-blind readers can tell apart.

    Raises:
        UserError: no result has a loss.
    """
    curves = {label: result for label, result in results.items() if result.loss}
    if not curves:
        raise UserError("no result has a loss to plot", hint="give results of `veiltune tune`")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    figure.suptitle(_verbatim(f"Loss while tuning {_title(curves)}"), x=0.01, ha="left", fontsize=12)
    axes = figure.add_subplot()
    for index, (label, result) in enumerate(curves.items()):
        _plot_run(axes, index, label, result)
    if any(result.validation_loss for result in curves.values()):
        axes.plot([], [], "D", color="#666666", markersize=5, label="on held-out data")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats a target token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(visible=True, color="#E4E4E4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, handlelength=3)
    if note := _caption(curves):
        axes.set_title(_verbatim(note), loc="left", fontsize=8, color="#B00000")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _plot_run(axes: Any, index: int, label: str, result: RunResult) -> None:
    """One run's curve and points. The first is a broad pale band, on which a thin dashed line can lie and be seen."""
    look = {
        "color": _COLOURS[index % len(_COLOURS)],
        "alpha": 0.45 if index == 0 else 1.0,
        "linewidth": 5.0 if index == 0 else max(1.2, 2.2 - 0.4 * index),
        "linestyle": _STYLES[index % len(_STYLES)],
        "zorder": 2 + index,
    }
    marker = "o" if len(result.loss) == 1 else None  # a single point draws no line
    axes.plot(range(1, len(result.loss) + 1), result.loss, marker=marker, label=_verbatim(label), **look)
    if result.validation_loss:
        steps, values = zip(*result.validation_loss, strict=True)
        size = max(4, 9 - 3 * index)
        axes.plot(steps, values, "D", color=look["color"], alpha=look["alpha"], markersize=size, zorder=20 + index)


def _verbatim(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
