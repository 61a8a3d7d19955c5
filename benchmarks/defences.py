"""What a defence at the cut is worth: accuracy and bytes beside what the strongest attack finds, with it and without.

The runs and attacks are those of the study `positions` (`veiltune compare positions`): `online` under SmolLM2-135M with six
blocks below and six above the trunk, sending every position, or of each row its first and its last 16, 8 or 2. The attack is the
learned inverter, which knows the defence: it learns with the same positions left out and guesses every token. Quickly: one number
of positions, two steps.
"""

from __future__ import annotations

from benchmarks._record import Row, run
from benchmarks._studies import attack_rows, measured, run_rows, shipped


def measure(quick: bool) -> list[Row]:
    """Whatever cells of the study are not measured yet; the rows of its runs, then of its attacks."""
    found = measured("defences", shipped("positions", quick=quick))
    return [*run_rows(found), *attack_rows(found)]


if __name__ == "__main__":
    run("defences", __doc__, measure)
