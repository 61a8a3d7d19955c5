"""How the cost of protection grows with depth, width and sequence length: a training step's ratio to plain PEFT.

Random Llama-like models (vocabulary 8,192), LoRA rank 16, float32; one of depth, width and length is varied at a time around 8
blocks of width 512 and batches of 4 x 128. `compact` and `veil` take turns with the plain step in one run for each point.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks._cells import cell
from benchmarks._record import Row, run
from benchmarks._steps import CASES, steps_by_turns, timed_row

VOCABULARY, HEAD = 8192, 64
BASE = {"depth": 8, "width": 512, "length": 128}
QUICK = {"depth": 2, "width": 64, "length": 32}
BATCH, ROUNDS = 4, 4
POINTS: dict[str, tuple[int, ...]] = {"depth": (4, 8, 16), "width": (256, 512, 1024), "length": (64, 128, 512)}
SETTINGS = ("compact", "veil")


def _point(depth: int, width: int, length: int, rounds: int) -> list[Row]:
    model = f"random:llama:{depth},{width},{max(2, width // HEAD)},{VOCABULARY}"
    times, figures = steps_by_turns(SETTINGS, model, BATCH, length, rounds)
    shape = {"depth": depth, "width": width}
    return [
        {"design": CASES[setting][0], "setting": setting, **shape, **timed_row(times, setting, found, BATCH, length)}
        for setting, found in figures.items()
    ]


def measure(quick: bool) -> list[Row]:
    """Every point of every line; where lines meet, the point stands in each."""
    lines = {"depth": (2,)} if quick else POINTS
    rows: list[Row] = []
    for varied, values in lines.items():
        for value in values:
            shape: dict[str, Any] = {**(QUICK if quick else BASE), varied: value}
            rounds = 2 if quick else ROUNDS
            point = partial(_point, **shape, rounds=rounds)
            found = point() if quick else cell("scaling", {**shape, "rounds": rounds}, point)
            rows += [{"varied": varied, **row} for row in found]
    return rows


if __name__ == "__main__":
    run("scaling", __doc__, measure)
