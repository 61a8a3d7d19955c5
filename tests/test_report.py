"""Reports show what records say, in words a reader cannot misread, and nothing else."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from veiltune.errors import UserError
from veiltune.models.accounting import shares, tensor_placement
from veiltune.models.presets import random_config
from veiltune.report import (
    NOTHING,
    SIMULATED,
    SIMULATED_NOTE,
    comparison_markdown,
    comparison_rows,
    comparison_table,
    inspect_table,
    plot_losses,
)
from veiltune.results import Answer, Cost, EnclaveCost, Exactness, Labels, Measurement, RunResult, Spread


def full_result(**changes: Any) -> RunResult:
    fields: dict[str, Any] = {
        "design": "obfuscatune",
        "model": "random:gpt2",
        "config": {},
        "fingerprint": "ab" * 32,
        "versions": {},
        "loss": [3.0, 2.5],
        "validation_loss": [(2, 2.25)],
        "utility": {"piqa/acc_norm": Measurement(value=0.6, n=50, ci95=(0.46, 0.72))},
        "exactness": Exactness(logits=1e-6, bounds={"logits": 1e-5}),
        "cost": Cost(
            seconds_per_step=Spread.of([1.0, 2.0, 3.0]),
            crossings_per_step=16.0,
            peak_rss={"host": 1_000_000, "enclave": 1000},
            enclave=EnclaveCost(param_share=0.2, flop_share=0.4, seconds_share=0.1),
            revealed_param_share={"host": 0.0001},
        ),
        "simulated_enclave": True,
        "labels": Labels(reproducible_secrets=True, bfloat16="rounded"),
    }
    return RunResult.model_validate(fields | changes)


def local_result(**changes: Any) -> RunResult:
    plain: dict[str, Any] = {
        "design": "local",
        "simulated_enclave": False,
        "exactness": Exactness(),
        "cost": Cost(seconds_per_step=Spread.of([1.0, 1.0])),
        "labels": Labels(),
        "answers": [],
        "utility_before": {"piqa/acc_norm": Measurement(value=0.5, n=50, ci95=(0.36, 0.64))},
    }
    return full_result(**(plain | changes))


def cells(results: dict[str, RunResult]) -> dict[str, list[str]]:
    return dict(comparison_rows(results))


def rendered(table: Table, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_comparison_shows_the_records_figures() -> None:
    rows = cells({"plain": local_result(), "ours": full_result()})
    assert rows["piqa/acc_norm"] == ["0.600 [0.460, 0.720] n=50"] * 2
    assert rows["piqa/acc_norm, zero-shot"] == ["0.500 [0.360, 0.640] n=50", NOTHING]
    assert rows["error in logits"] == [NOTHING, "1.0e-06 ≤ 1.0e-05"]
    assert rows["seconds a step"] == ["1 (1 to 1)", "2 (1.2 to 2.8)"]
    assert rows["parameters in the enclave"] == [NOTHING, "20.0%"]
    assert rows["largest memory of a party"] == [NOTHING, "1.0 MB (host)"]
    assert rows["keys"] == [NOTHING, "REPRODUCIBLE from a seed"]
    assert rows["parameters revealed to"] == [NOTHING, "host <0.1%"]
    assert rows["bfloat16"] == [NOTHING, "rounded"]
    assert "bytes a step" not in rows  # nobody recorded it


def test_ratio_is_the_recorded_one_or_says_that_it_is_not() -> None:
    ours = full_result()
    rows = cells({"plain": local_result(), "ours": ours})
    assert rows["ratio to local"] == ["1x", "2.00x (of medians)"]
    timed = ours.model_copy(update={"cost": ours.cost.model_copy(update={"step_ratio": Spread.of([1.25])})})
    assert cells({"plain": local_result(), "ours": timed})["ratio to local"][1] == "1.25x (1.25 to 1.25)"
    assert "ratio to local" not in cells({"ours": ours})


def test_exceeded_bound_is_loud() -> None:
    broken = full_result(exactness=Exactness(logits=1e-3, loss=float("nan"), bounds={"logits": 1e-5, "loss": 1e-6}))
    rows = cells({"ours": broken})
    assert rows["error in logits"] == ["1.0e-03 EXCEEDS 1.0e-05"]
    assert rows["error in loss"] == ["nan EXCEEDS 1.0e-06"]


def test_simulated_enclave_is_named_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"plain": local_result(), "ours": full_result()}
    assert cells(results)["enclave"] == [NOTHING, SIMULATED]
    assert f"ours: {SIMULATED_NOTE}" in " ".join(rendered(comparison_table(results)).split())
    assert f"ours: {SIMULATED_NOTE}" in comparison_markdown(results)
    assert f"ours: {SIMULATED_NOTE}" in drawn_titles(results, tmp_path, monkeypatch)
    genuine = {"plain": local_result(), "ours": full_result(simulated_enclave=False)}
    assert cells(genuine)["enclave"] == [NOTHING, "not simulated"]
    assert "SIMULATED" not in rendered(comparison_table(genuine)) + comparison_markdown(genuine)
    assert "SIMULATED" not in drawn_titles(genuine, tmp_path, monkeypatch)


def drawn_titles(results: dict[str, RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    from matplotlib.figure import Figure

    seen: list[str] = []
    save = Figure.savefig

    def spy(figure: Figure, *args: Any, **kwargs: Any) -> None:
        seen.extend([figure.get_suptitle(), *(axes.get_title(loc="left") for axes in figure.axes)])
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    plot_losses(results, tmp_path / "plot.png")
    monkeypatch.undo()
    return "\n".join(seen)


def test_labels_and_answers_are_text_and_not_markup() -> None:
    label = "[bold]a|b*"
    result = full_result(answers=[Answer(prompt="# x | y", text="line 1\n\n* line 2")])
    assert label in rendered(comparison_table({label: result}))
    markdown = comparison_markdown({label: result})
    lines = markdown.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {3}
    assert "    # x | y" in lines
    assert "    * line 2" in lines


def test_nothing_to_compare_or_plot_is_an_error(tmp_path: Path) -> None:
    for report in (comparison_table, comparison_markdown):
        with pytest.raises(UserError, match="no results"):
            report({})
    with pytest.raises(UserError, match="no result has a loss"):
        plot_losses({"untrained": full_result(loss=[])}, tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []


def test_coinciding_curves_both_show(tmp_path: Path) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    losses = [3.0 - 0.01 * step for step in range(100)]
    results = {
        "plain": local_result(loss=losses, validation_loss=[], model="$a_b$"),
        "ours": full_result(loss=losses, validation_loss=[], model="$a_b$"),
    }
    plot_losses(results, tmp_path / "deep" / "plot.png")
    image = imread(tmp_path / "deep" / "plot.png")[:, :, :3]
    height, width, _ = image.shape
    assert (width, height) == (1200, 720)
    middle = image[
        int(0.3 * height) : int(0.8 * height), int(0.2 * width) : int(0.6 * width)
    ]  # neither axes nor legend
    over = to_rgb("#D55E00")
    blue = to_rgb("#0072B2")
    under = tuple(0.45 * part + 0.55 for part in blue)  # on white
    for colour in (over, under):
        close = (abs(middle - colour) < 0.02).all(axis=-1)
        assert close.sum() > 200, f"hardly a pixel of {colour}"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["plot.png"]


@pytest.mark.parametrize("loss", [[2.0], [2.0, float("nan"), 1.0]])
def test_single_steps_and_gaps_can_be_plotted(tmp_path: Path, loss: list[float]) -> None:
    plot_losses({"ours": full_result(loss=loss)}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_says_who_holds_and_sees_what() -> None:
    config = random_config("qwen3:2,32,4,384")
    placements: Any = {
        "local": ("compact", "local"),
        "compact": ("compact", "obfuscatune"),
        "paper": ("paper", "obfuscatune"),
    }
    places = {label: tensor_placement(config, placement, design) for label, (placement, design) in placements.items()}
    counts = {
        label: shares(config, placement, 2, 8, design=design) for label, (placement, design) in placements.items()
    }
    table = inspect_table("[m]", places, counts, {"compact": {"host": ["masked states", "Q, K, V"]}})
    text = rendered(table)
    lines = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]]
        for line in text.splitlines()
        if "│" in line
    }
    assert lines["attention input weights"][1:] == ["host, in the clear", "host, masked", "host, masked"]
    assert lines["attention inner norms"][1:] == ["host, in the clear", "host, in the clear", "enclave"]
    assert lines["token embedding, also the head"] == ["12,288", "host, in the clear", "enclave", "enclave"]
    assert lines["parameters in the enclave"][1:] == [
        "0.0%",
        *(f"{100 * counts[k].param_share:.1f}%" for k in ("compact", "paper")),
    ]
    assert lines["crossings of a forward pass"][1:] == ["0", "8", "16"]
    assert lines["the host sees"][1:] == [NOTHING, "masked states", NOTHING]
    assert "[m]: " in text
    kinds = [name for name in lines if lines[name][0].replace(",", "").isdigit()]
    assert sum(int(lines[kind][0].replace(",", "")) for kind in kinds) == counts["local"].num_parameters
    with pytest.raises(UserError, match="counts"):
        inspect_table("m", places, {})
