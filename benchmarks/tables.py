"""The tables of README and docs, made from the committed results and from nothing else.

`python -m benchmarks.tables` rewrites what stands between `<!-- figures: NAME -->` and `<!-- /figures -->` in the pages; with
`--check` it only says whether they are up to date (a test does the same).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

from benchmarks import claims, timing
from benchmarks._record import RESULTS, Row
from benchmarks.defences import AGAIN

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))))
_BLOCK = re.compile(r"(<!-- figures: ([a-z_]+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def rows_of(name: str) -> list[Row]:
    """Rows of a committed result; none if it was never measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    if not lines:
        return "*Not measured yet.*"
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(line) + " |" for line in lines)]
    )


def _accuracy(row: Row | None, key: str = "value") -> str:
    if row is None:
        return "–"
    low, high = row["ci95"]
    return f"{100 * row[key]:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def utility() -> str:
    """Accuracy by design and task, with intervals."""
    rows = rows_of("utility")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    found = {(row["design"], row["setting"], row["task"]): row for row in rows}
    lines = [
        [f"`{design}`", setting, *(_accuracy(found.get((design, setting, task))) for task in tasks)]
        for design, setting in dict.fromkeys((row["design"], row["setting"]) for row in rows)
    ]
    counts = {row["task"]: row["n"] for row in rows}
    return _markdown(["design", "setting", *(f"{task} (n = {counts[task]})" for task in tasks)], lines)


def wire() -> str:
    """Bytes over the cut."""
    lines = [
        [
            f"`{row['design']}`",
            row["setting"],
            f"{row['bytes_per_token']:,.0f}",
            f"{row['bytes_per_step'] / 1e6:.2f} MB",
            "–" if row["ratio_to_float32"] is None else f"{100 * row['ratio_to_float32']:.2f}%",
        ]
        for row in rows_of("wire")
    ]
    return _markdown(["design", "wire", "bytes a token", "bytes a step", "of float32"], lines)


def _sweep(which: str) -> str:
    """What decorrelation (``alpha``) or a coarser ``wire`` costs."""
    lines = [
        [
            row["setting"],
            _accuracy(row),
            f"{row['loss']:.3f}",
            "–" if row["correlation"] is None else f"{row['correlation']:.3f}",
            f"{row['bytes_per_step'] / 1e6:.3f} MB",
        ]
        for row in rows_of("sweeps")
        if row["sweep"] == which
    ]
    return _markdown([which, "accuracy (95%)", "loss, last 10 steps", "dCor, last 10 steps", "bytes a step"], lines)


def defences() -> str:
    """Accuracy, bytes and what the learned inverter finds, with defences at the cut and without."""
    rows = [row for row in rows_of("defences") if row["study"] != AGAIN]
    lines: list[list[str]] = []
    for row in rows:
        if not row.get("ci95") or "attack" in row:  # of a run: its other metrics have no interval
            continue
        own = [
            each
            for each in rows
            if "attack" in each
            and (each["study"], each["design"], each["task"]) == (row["study"], row["design"], row["task"])
            and each["setting"].partition(";")[0] == row["setting"]
        ]
        found = [_found([each for each in own if each["phase"] == phase]) for phase in ("tuning", "questions")]
        crossed = "–" if row["bytes_per_step"] is None else f"{row['bytes_per_step'] / 1e3:,.0f} kB"
        share = "–" if row["owner_share"] is None else f"{100 * row['owner_share']:.0f}%"
        lines.append([f"`{row['design']}`", row["setting"], row["task"], share, _accuracy(row), crossed, *found])
    head = ["design", "setting", "task", "at the owner", "accuracy (95%)", "bytes a step", "tuning texts", "questions"]
    return _markdown(head, lines)


def defence_seeds() -> str:
    """What few positions lose against all, in points of accuracy, seed by seed."""
    rows = [row for row in rows_of("defences") if row.get("ci95") and "attack" not in row]
    again = [row for row in rows if row["study"] == AGAIN]
    tasks = {row["task"] for row in again}
    first = [{**row, "seed": 0} for row in rows if row["study"] == "deep" and row["task"] in tasks]
    found = {(row["design"], row["setting"], row["seed"]): row["value"] for row in [*first, *again]}
    seeds = sorted({seed for _, _, seed in found})
    settings = list(dict.fromkeys((row["design"], row["setting"]) for row in again))
    lines: list[list[str]] = []
    for design, few in (each for each in settings if _sent_few(each[1])):
        every = next((setting for name, setting in settings if name == design and not _sent_few(setting)), None)
        keys = [((design, few, seed), (design, every, seed)) for seed in seeds]
        if not all(key in found for pair in keys for key in pair):  # not measured yet
            continue
        pairs = [(100 * found[part], 100 * found[whole]) for part, whole in keys]
        lost = [whole - part for part, whole in pairs]
        told = [f"{part:.1f} for {whole:.1f}" for part, whole in pairs]
        lines.append([f"`{design}`", few, *told, f"{mean(lost):.1f} ({min(lost):.1f} to {max(lost):.1f})"])
    return _markdown(["design", "setting", *(f"seed {seed}" for seed in seeds), "points lost, mean (range)"], lines)


def _sent_few(setting: str) -> bool:
    """Whether a setting leaves positions out."""
    return "last_positions=" in setting and "last_positions=0" not in setting


def _found(rows: list[Row]) -> str:
    """ROUGE-L with its interval and the two controls; or that nothing crossed, or why there is no figure."""
    for row in rows:
        if row.get("metric") == "rougeL":
            return claims.figure(row, f"controls {' and '.join(claims.controls(row))}")
        if "nothing" in row:
            return claims.counted(row)
    return next((key for row in rows for key in claims.WITHOUT_FIGURES if key in row), "–")


KNOBS: tuple[tuple[str, str, dict[str, float], tuple[str, str]], ...] = (
    ("alpha", "α of `online`, 8 bits", {"bits": 8}, ("ridge_inverter", "vocabulary_matching")),
    ("bits", "bits of `online`'s states, α = 0", {"alpha": 0}, ("ridge_inverter", "vocabulary_matching")),
    ("kappa", "κ of `obfuscatune`", {}, ("gram_anchors", "known_plaintext")),
)
"""What is turned, what that is, which other knobs stand where, and the attacks that are shown."""


def knobs() -> str:
    """What attacks find, and accuracy, at each value of a knob."""
    lines: list[list[str]] = []
    for knob, what, others, attacks in KNOBS:
        turned = [row for row in rows_of("knobs") if knob in row and all(row.get(k) == v for k, v in others.items())]
        for value in sorted({row[knob] for row in turned}):
            group = [row for row in turned if row[knob] == value]
            found = [_strongest([row for row in group if row["attack"] == attack]) for attack in attacks]
            lines.append([what, f"{value:g}", _accuracy(group[0].get("accuracy")), *found])
    return _markdown(["knob", "value", "accuracy (95%)", "first attack", "second attack"], lines)


def _strongest(rows: list[Row]) -> str:
    """An attack's name and its largest ROUGE-L with its interval, over its own settings; or why there is none."""
    texts = [row for row in rows if row.get("metric") == "rougeL"]
    if texts:
        worst = max(texts, key=lambda row: row["value"])
        return f"`{worst['attack']}` {claims.figure(worst)}"
    why = [key for row in rows for key in claims.WITHOUT_FIGURES if key in row]
    return f"`{rows[0]['attack']}` {why[0]}" if why else "–"


def study_time() -> str:
    """Minutes that the small study's cells took."""
    rows = rows_of("study_time")
    lines = [[row["what"], str(row["cells"]), f"{row['seconds'] / 60:.1f}"] for row in rows]
    total = ["all", str(sum(row["cells"] for row in rows)), f"{sum(row['seconds'] for row in rows) / 60:.1f}"]
    return _markdown(["cells", "n", "minutes"], [*lines, total] if rows else [])


def owner_shares() -> str:
    """Parameters and forward FLOPs at the owner."""
    lines = [
        [
            row["model"],
            f"{row['num_parameters'] / 1e6:,.0f}M",
            f"{row['bottom_layers']} + {row['top_layers']}",
            f"{100 * row['owner_share']:.1f}%",
            f"{100 * row['flop_share']:.1f}%",
        ]
        for row in rows_of("owner_shares")
    ]
    return _markdown(["model", "parameters", "cut", "parameters at the owner", "forward FLOPs at the owner"], lines)


def condition_number() -> str:
    """What κ costs in both dtypes."""
    lines = [
        [
            row["matrix"] if row["design"] != "local" else "none (`local`)",
            "–" if row["condition_number"] is None else f"{row['condition_number']:.0f}",
            row["dtype"],
            f"{row['logit_error']:.1e}",
            f"{row['loss']:.3f}",
            _accuracy({**row, "value": row["accuracy"]}),
        ]
        for row in rows_of("condition_number")
    ]
    return _markdown(["key", "κ", "dtype", "logit error", "loss after tuning", "accuracy (95%)"], lines)


def enclave_shares() -> str:
    """Parameters and forward FLOPs in the enclave, compact placement."""
    lines = [
        [
            row["model"],
            f"{row['num_parameters'] / 1e6:.0f}M",
            f"{100 * row['param_share']:.1f}%",
            f"{100 * row['flop_share']:.1f}%",
        ]
        for row in rows_of("enclave_shares")
        if row["placement"] == "compact"
    ]
    return _markdown(["model", "parameters", "parameters in the enclave", "forward FLOPs in the enclave"], lines)


def protect_memory() -> str:
    """Growth of each party's resident set while a model is protected."""
    lines = [
        [
            row["model"],
            f"{row['checkpoint_bytes'] / 1e9:.2f} GB",
            f"{row['block_bytes'] / 1e9:.2f} GB",
            *(f"{row['grown_bytes'][party] / 1e9:.2f} GB" for party in ("provider", "enclave", "host")),
            f"{row['all_grown_bytes'] / 1e9:.2f} GB",
        ]
        for row in rows_of("protect_memory")
    ]
    return _markdown(["model", "checkpoint", "a block", "provider", "enclave", "host", "all at once, at worst"], lines)


def _made(table: Callable[[claims.Rows, claims.Markdown], str]) -> Callable[[], str]:
    return lambda: table(rows_of, _markdown)


TABLES: dict[str, Callable[[], str]] = {
    **{table.__name__: _made(table) for table in timing.TABLES},
    "claims_exact": _made(claims.exact),
    "ancestry": _made(claims.ancestry),
    "claims_attacks": _made(claims.attacks),
    "leaks": _made(claims.leaks),
    "claims_not_protected": partial(claims.not_protected, _markdown),
    "utility": utility,
    "wire": wire,
    "sweep_alpha": partial(_sweep, "alpha"),
    "sweep_wire": partial(_sweep, "wire"),
    "defences": defences,
    "defence_seeds": defence_seeds,
    "knobs": knobs,
    "study_time": study_time,
    "owner_shares": owner_shares,
    "condition_number": condition_number,
    "enclave_shares": enclave_shares,
    "protect_memory": protect_memory,
}
"""By the name that a page asks for."""


def rendered(text: str) -> str:
    """A page with every block of figures made anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def stale() -> list[str]:
    """Pages whose figures are not those of the committed results."""
    return [page for page in PAGES if (text := (ROOT / page).read_text(encoding="utf-8")) != rendered(text)]


def main() -> None:
    """Rewrite the pages, or check them."""
    pages = stale()
    if "--check" in sys.argv[1:]:
        sys.exit(f"figures are not those of the results: {', '.join(pages)}" if pages else 0)
    for page in pages:
        (ROOT / page).write_text(rendered((ROOT / page).read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
