"""What the strongest attacks get out of recorded runs of SmolLM2-135M, each knowing the defence, with both controls.

The runs and attacks are those of the study `strong` (`veiltune compare strong`); cells and rows are kept as `benchmarks.attacks`
keeps its own. The victim's text is commonsenseqa (its questions: the items that accuracy is measured on), the attacker's public
text a mix of the other packaged tasks. Quickly: `online` alone, two steps.
"""

from __future__ import annotations

from benchmarks._record import Row, run
from benchmarks._studies import attack_rows, measured, shipped


def measure(quick: bool) -> list[Row]:
    """Whatever cells of the study are not measured yet, and the rows of all its attacks."""
    return attack_rows(measured("strong_attacks", shipped("strong", quick=quick)))


if __name__ == "__main__":
    run("strong_attacks", __doc__, measure)
