"""Tables of time, bytes and memory, from committed results."""

from __future__ import annotations

from typing import Any

from benchmarks._record import Row
from benchmarks.claims import Markdown, Rows

README_BATCH = (4, 128)
README_MODELS = ("SmolLM2-135M-Instruct", "random GPT-2 small")
"""What the short table shows; the rest stands on the page of `veil`."""


def ratio(value: dict[str, Any]) -> str:
    """Median, spread and number."""
    return f"{value['median']:.2f} ({value['p10']:.2f}–{value['p90']:.2f}, n = {value['n']})"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def step_ratio(rows_of: Rows, markdown: Markdown) -> str:
    """Ratio to the plain PEFT step, designs with an enclave, by the models and the batch that people look at first."""
    lines = [
        [
            row["model"],
            f"`{row['design']}`",
            "" if row["setting"] == row["design"] else row["setting"].removeprefix(f"{row['design']}, "),
            ratio(row["ratio"]),
            f"{row['crossings_per_step']:.0f}",
            f"{row['border_bytes_per_step'] / 1e6:.1f} MB",
            _share(row["enclave_seconds_share"]),
        ]
        for row in rows_of("step_ratio")
        if "enclave_seconds_share" in row
        and (row["batch"], row["length"]) == README_BATCH
        and row["model"] in README_MODELS
    ]
    head = [
        "model",
        "design",
        "setting",
        "step / plain PEFT step",
        "messages a step",
        "over the border",
        "enclave's share of time",
    ]
    return markdown(head, lines)


def step_ratio_veil(rows_of: Rows, markdown: Markdown) -> str:
    """`veil` and `obfuscatune` side by side: every model and batch."""
    lines = [
        [
            row["model"],
            f"{row['batch']} × {row['length']}",
            row["setting"],
            ratio(row["ratio"]),
            "–" if "ratio_to_compact" not in row else ratio(row["ratio_to_compact"]),
            f"{row['border_bytes_per_token'] / 1e3:.1f} kB",
            _share(row["enclave_seconds_share"]),
            _share(row["enclave_flops_share"]),
        ]
        for row in rows_of("step_ratio")
        if "enclave_flops_share" in row
    ]
    head = [
        "model",
        "batch",
        "setting",
        "step / plain PEFT step",
        "step / `obfuscatune` compact",
        "over the border, a token",
        "enclave's share of time",
        "of forward FLOPs",
    ]
    return markdown(head, lines)


def split_ratio(rows_of: Rows, markdown: Markdown) -> str:
    """Ratio to the plain PEFT step on all layers, and memory, designs that cut the model."""
    lines = [
        [
            f"`{row['design']}`",
            row["setting"],
            ratio(row["ratio"]),
            f"{row['crossings_per_step']:.0f}",
            f"{row['border_bytes_per_step'] / 1e6:.2f} MB",
            *(f"{row['peak_rss'][party] / 1e9:.2f} GB" for party in ("owner", "provider")),
        ]
        for row in rows_of("step_ratio")
        if "peak_rss" in row
    ]
    head = ["design", "setting", "step / plain PEFT step", "messages a step", "over the cut", "owner", "provider"]
    return markdown(head, lines)


def generation(rows_of: Rows, markdown: Markdown) -> str:
    """Seconds of a generation against `transformers` alone, and whether the tokens are the same."""
    lines = [
        [
            row["setting"],
            ratio(row["ratio"]),
            f"{row['tokens_per_second']['median']:.1f}",
            f"{row['plain_tokens_per_second']['median']:.1f}",
            "yes" if row["is_equal"] else "**no**",
        ]
        for row in rows_of("generation")
    ]
    head = ["setting", "time / `transformers` alone", "tokens a second", "alone", "the same tokens"]
    return markdown(head, lines)


def scaling(rows_of: Rows, markdown: Markdown) -> str:
    """A step's ratio at each point of each line, `compact` beside `veil`."""
    found: dict[tuple[str, int, int, int], dict[str, Row]] = {}
    for row in rows_of("scaling"):
        found.setdefault((row["varied"], row["depth"], row["width"], row["length"]), {})[row["setting"]] = row
    lines = [
        [
            varied,
            str(depth),
            str(width),
            str(length),
            *(ratio(rows[setting]["ratio"]) for setting in ("compact", "veil")),
            *(f"{rows[setting]['border_bytes_per_token'] / 1e3:.1f} kB" for setting in ("compact", "veil")),
        ]
        for (varied, depth, width, length), rows in found.items()
    ]
    head = [
        "varied",
        "blocks",
        "width",
        "length",
        "`obfuscatune` compact / plain",
        "`veil` / plain",
        "compact, a token",
        "veil, a token",
    ]
    return markdown(head, lines)


def network(rows_of: Rows, markdown: Markdown) -> str:
    """Steps and tokens by link and setting."""
    lines = [
        [
            row["link"],
            row["setting"],
            f"{row['step_seconds']['median']:.2f} s",
            _times(row["step_ratio_to_compact"]),
            f"{1e3 * row['token_seconds']['median']:.0f} ms",
            _times(row["generation_ratio_to_compact"]),
        ]
        for row in rows_of("network")
    ]
    head = ["link", "setting", "a step", "faster than compact", "a token", "faster than compact"]
    return markdown(head, lines)


def _times(value: dict[str, Any] | None) -> str:
    return "–" if value is None else f"{1 / value['median']:.1f} ×"


def stream_protect(rows_of: Rows, markdown: Markdown) -> str:
    """Memory of protecting a checkpoint on disk, against its largest tensor."""
    lines = [
        [
            str(row["blocks"]),
            f"{row['source_bytes'] / 1e9:.1f} GB",
            f"{row['largest_tensor_bytes'] / 1e9:.2f} GB",
            f"{row['peak_rss'] / 1e9:.2f} GB",
            f"{row['wall_seconds'] / 60:.0f} min",
        ]
        for row in rows_of("stream_protect")
    ]
    return markdown(["blocks", "checkpoint", "largest tensor", "largest resident set", "time, one thread"], lines)


TABLES = (step_ratio, step_ratio_veil, split_ratio, generation, scaling, network, stream_protect)
