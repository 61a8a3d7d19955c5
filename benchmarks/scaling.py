"""How the cost of protection grows with depth, width and sequence length: a training step's ratio to plain PEFT.

Random Llama-like models (vocabulary 8,192), LoRA rank 16, float32; one of depth, width and length is varied at a time around 8
blocks of width 512 and batches of 4 x 128. `compact` and `veil` take turns with the plain step in one run for each point.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from benchmarks._cells import cell
from benchmarks._record import Row, alternate, run
from benchmarks._runs import live
from benchmarks._steps import CASES, LORA, plain_step, protected_step, random_ids, timed_row
from veiltune.parties.owner import Owner

VOCABULARY, HEAD = 8192, 64
BASE = {"depth": 8, "width": 512, "length": 128}
BATCH, ROUNDS = 4, 4
POINTS: dict[str, tuple[int, ...]] = {"depth": (4, 8, 16), "width": (256, 512, 1024), "length": (64, 128, 512)}
SETTINGS = ("compact", "veil")


def _point(varied: str, depth: int, width: int, length: int, rounds: int) -> list[Row]:
    model = f"random:llama:{depth},{width},{max(2, width // HEAD)},{VOCABULARY}"
    ids = random_ids(model, BATCH, length)
    with ExitStack() as stack:
        tables = {"data": {"max_length": length}, "train": {"batch_size": BATCH}}
        owners: dict[str, Owner] = {}
        steps = {"plain": plain_step(model, ids)}
        for setting in SETTINGS:
            design, options = CASES[setting]
            owners[setting] = stack.enter_context(live(design, model, lora=LORA, **tables, **{design: options}))
            steps[setting] = protected_step(owners[setting], ids)
        times = alternate(steps, rounds, warmup=2)
        figures = {setting: owner.tuner.figures() for setting, owner in owners.items()}
    shape = {"varied": varied, "depth": depth, "width": width}
    return [
        {"design": CASES[setting][0], "setting": setting, **shape, **timed_row(times, setting, found, BATCH, length)}
        for setting, found in figures.items()
    ]


def measure(quick: bool) -> list[Row]:
    """Every point of every line; where lines meet, the point stands in each."""
    if quick:
        return _point("depth", 2, 64, 32, 2)
    rows: list[Row] = []
    for varied, values in POINTS.items():
        for value in values:
            shape: dict[str, Any] = {**BASE, varied: value}
            found = cell(
                "scaling", {**shape, "rounds": ROUNDS}, lambda s=shape, v=varied: _point(v, **s, rounds=ROUNDS)
            )
            rows += [{**row, "varied": varied} for row in found]
    return rows


if __name__ == "__main__":
    run("scaling", __doc__, measure)
