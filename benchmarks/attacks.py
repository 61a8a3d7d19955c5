"""What attacks get out of recorded runs of SmolLM2-135M: every design, first and last texts, with both controls.

The runs and attacks are those of the study `small` (`veiltune compare small`), and so are the cells: what was measured is kept
under ``benchmarks/.cells/attacks``, where the comparison's own report lies too. The victim's text is commonsenseqa, the
attacker's public text BoolQ. What was tuned on comes first, then the questions that accuracy was measured on; where no pass of
a phase crossed, a row says so. Known plaintext and Gram anchors know the tokens of some of the victim's own texts; those are
not scored. The public ancestor is the model itself with Gaussian noise of the stated relative size. Quickly: `online` alone,
two steps.
"""

from __future__ import annotations

from benchmarks._record import Row, run
from benchmarks._studies import measured


def measure(quick: bool) -> list[Row]:
    """Whatever cells of the study are not measured yet, and the rows of all its attacks."""
    return measured("small", "attacks", quick=quick)


if __name__ == "__main__":
    run("attacks", __doc__, measure)
