"""The loss curves of runs, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veiltune.errors import UserError
from veiltune.report.comparison import Results, caption, title
from veiltune.report.figures import COLOURS, verbatim, write_png
from veiltune.results import RunResult

_STYLES = ("-", "--", ":", "-.")


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
    figure.suptitle(verbatim(f"Loss while tuning {title(curves)}"), x=0.01, ha="left", fontsize=12)
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
    if note := caption(curves):
        axes.set_title(verbatim(note), loc="left", fontsize=8, color="#B00000")
    write_png(figure, path)


def _plot_run(axes: Any, index: int, label: str, result: RunResult) -> None:
    """One run's curve and points. The first is a broad pale band, on which a thin dashed line can lie and be seen."""
    look = {
        "color": COLOURS[index % len(COLOURS)],
        "alpha": 0.45 if index == 0 else 1.0,
        "linewidth": 5.0 if index == 0 else max(1.2, 2.2 - 0.4 * index),
        "linestyle": _STYLES[index % len(_STYLES)],
        "zorder": 2 + index,
    }
    marker = "o" if len(result.loss) == 1 else None  # a single point draws no line
    axes.plot(range(1, len(result.loss) + 1), result.loss, marker=marker, label=verbatim(label), **look)
    if result.validation_loss:
        steps, values = zip(*result.validation_loss, strict=True)
        size = max(4, 9 - 3 * index)
        axes.plot(steps, values, "D", color=look["color"], alpha=look["alpha"], markersize=size, zorder=20 + index)
