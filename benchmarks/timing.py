"""Tables of time, bytes and memory, from committed results."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks._record import Row
from benchmarks.claims import Markdown, Rows

README_BATCH = (4, 128)
README_MODELS = ("SmolLM2-135M-Instruct", "random GPT-2 small")
"""What the short table shows; the rest stands on the page of `veil`."""
ENCLAVED = ("obfuscatune", "veil")


def ratio(value: dict[str, Any]) -> str:
    """Median, spread and number."""
    return f"{value['median']:.2f} ({value['p10']:.2f}–{value['p90']:.2f}, n = {value['n']})"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def _beside(design: str, setting: str) -> str:
    """What a setting says beside its design's name."""
    return "" if setting == design else setting.removeprefix(f"{design}, ")


def step_ratio(rows_of: Rows, markdown: Markdown) -> str:
    """Ratio to the plain PEFT step, designs with an enclave, by the models and the batch that people look at first."""
    lines = [
        [
            row["model"],
            f"`{row['design']}`",
            _beside(row["design"], row["setting"]),
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


SITE = "1 Gbit/s, 1 ms"
"""The link that the page of `veil` shows."""


def network(rows_of: Rows, markdown: Markdown) -> str:
    """Steps of each size and tokens over one link, designs with an enclave."""
    lines = [
        [
            _shape(row),
            row["setting"],
            _seconds(row.get("step_seconds")),
            _times(row.get("step_ratio_to_compact")),
            _seconds(row.get("token_seconds")),
            _times(row.get("generation_ratio_to_compact")),
        ]
        for row in rows_of("network")
        if row["link"] == SITE and row["design"] in ENCLAVED
    ]
    head = ["tokens", "setting", "a step", "faster than compact", "a token", "faster than compact"]
    return markdown(head, lines)


def links(rows_of: Rows, markdown: Markdown) -> str:
    """A step and a token by link, every design that crosses one, and one line with what the links themselves did."""
    rows = [row for row in rows_of("network") if _shape(row) == _shape({})]
    names = list(dict.fromkeys(row["link"] for row in rows))
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["design"], row["setting"]), {})[row["link"]] = row
    is_known = any("measured_bits_per_second" in row for row in rows)
    lines = [["the link by itself", "", "", "", *(_link_itself(rows, name) for name in names)]] if is_known else []
    for (design, setting), by_link in found.items():
        first = next(iter(by_link.values()))
        counted = [f"{first['crossings_per_step']:.0f}", f"{first['border_bytes_per_step'] / 1e6:.1f} MB"]
        cells = [_step_and_token(by_link[name]) if name in by_link else "–" for name in names]
        lines.append([f"`{design}`", _beside(design, setting), *counted, *cells])
    return markdown(["design", "setting", "messages a step", "bytes a step", *names], lines)


def _shape(row: Row) -> str:
    """Tokens of a step; of a result of an earlier version, which had one shape, that."""
    return f"{row.get('batch', README_BATCH[0])} × {row.get('length', README_BATCH[1])}"


def _link_itself(rows: list[Row], name: str) -> str:
    """What was measured of a link: once for each group of sessions that took turns over it."""
    found = [row for row in rows if row["link"] == name and "measured_bits_per_second" in row]
    if not found:
        return "–"
    trips = sorted({1e3 * row["measured_round_trip_seconds"] for row in found})
    rates = sorted({row["measured_bits_per_second"] / 1e9 for row in found})
    return f"{_range(trips, '.1f')} ms there and back, {_range(rates, '.2f')} Gbit/s"


def _range(values: list[float], how: str) -> str:
    low, high = format(values[0], how), format(values[-1], how)
    return low if low == high else f"{low}–{high}"


def _step_and_token(row: Row) -> str:
    if "left_out" in row:
        return f"over {row['link_seconds']:.0f} s (computed)"
    return f"{_seconds(row['step_seconds'])}; {_seconds(row['token_seconds'])}"


def _seconds(value: dict[str, Any] | None) -> str:
    if value is None:
        return "–"
    seconds = value["median"]
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"


def _times(value: dict[str, Any] | None) -> str:
    return "–" if value is None else f"{1 / value['median']:.1f} ×"


def channels(rows_of: Rows, markdown: Markdown) -> str:
    """A step among services with keys, against processes of one machine."""
    lines = [
        [
            row["setting"],
            row["data_plane"],
            _seconds(row["step_seconds"]),
            "–" if row["ratio"] is None else ratio(row["ratio"]),
        ]
        for row in rows_of("channels")
    ]
    return markdown(["parties", "between enclave and host", "a step", "step / among processes"], lines)


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


def kills(rows_of: Rows, markdown: Markdown) -> str:
    """How many parties were killed under each design, and whether the runs came out as if nobody had been."""
    rows = rows_of("kills")
    lines: list[list[str]] = []
    for whole in (row for row in rows if row["party"] == "all"):
        mine = [row for row in rows if row["design"] == whole["design"] and row["party"] != "all"]
        by_party = Counter(row["party"] for row in mine)
        seconds = sorted(row["seconds"] for row in mine if row["recovered"])
        lines.append(
            [
                f"`{whole['design']}`",
                str(whole["kills"]),
                ", ".join(f"{count} {party}" for party, count in sorted(by_party.items())),
                str(whole["runs"]),
                "yes" if whole["is_exact"] else f"**no**: {whole['fault']}",
                f"{seconds[len(seconds) // 2]:.0f} s, at most {seconds[-1]:.0f} s",
            ]
        )
    head = ["design", "kills", "of", "runs", "as if undisturbed, to the last bit", "until the next commit"]
    return markdown(head, lines)


TABLES = (
    step_ratio,
    step_ratio_veil,
    split_ratio,
    generation,
    scaling,
    network,
    links,
    channels,
    kills,
    stream_protect,
)
