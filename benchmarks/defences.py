"""What a defence at the cut is worth: accuracy and bytes beside what the strongest attack finds, with it and without.

The runs and attacks are those of two studies of SmolLM2-135M (`veiltune compare`). `positions`: `online` with six blocks below
and six above the trunk, sending every position, or of each row its first and its last 16, 8 or 2. `deep`: `online`, `offline`
and `gradfree` with a trunk of six blocks, every position or the first and the last few, and what the owner's layers reach
without the trunk. The attack is the learned inverter, which knows the defence: it learns with the same positions left out and
guesses every token. Quickly: one number of positions of `online`, two steps.
"""

from __future__ import annotations

from benchmarks._record import Row, run
from benchmarks._studies import attack_rows, measured, run_rows, shipped

STUDIES = ("deep", "positions")


def measure(quick: bool) -> list[Row]:
    """Whatever cells of the studies are not measured yet; of each the rows of its runs, then of its attacks."""
    rows: list[Row] = []
    for name in STUDIES:
        found = measured("defences", shipped(name, quick=quick))
        rows += [{"study": name, **row} for row in [*run_rows(found), *attack_rows(found)]]
    return rows


if __name__ == "__main__":
    run("defences", __doc__, measure)
