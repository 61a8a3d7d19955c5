"""From what a session left to the record of the run: figures are copied, sorted and labelled, never measured again.

What the parties measured comes from their own reports (losses, times, utility, memory) and from the meters on their
channels (bytes, messages); the enclave's shares of parameters and arithmetic are counted from the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from veiltune.config import Config
from veiltune.designs import DESIGNS, Design
from veiltune.models.accounting import DESIGNS as ACCOUNTED
from veiltune.models.accounting import Shares, shares
from veiltune.models.cut import Cut
from veiltune.models.family import Placement
from veiltune.models.skeleton import config_from_json, resolve_device
from veiltune.models.veil_accounting import veil_shares
from veiltune.results import (
    Answer,
    Cost,
    DataSummary,
    EmulatorReport,
    EnclaveCost,
    Exactness,
    Labels,
    RunResult,
    Spread,
    machine,
    measurements,
    versions,
)
from veiltune.session import Outcome
from veiltune.session.party_main import design_options
from veiltune.tee.attestation.verdict import SIMULATED
from veiltune.transport.transcript import Traffic

RESULT = "result.json"
"""The record's name in a run's output directory."""

_STEP_KINDS = ("TrainBatch", "OptimizerStep", "StepDone")
"""What the owner and the training engine exchange in a step and at no other time."""


def result_of(
    config: Config, outcome: Outcome, *, exactness: Exactness | None = None, length: int | None = None
) -> RunResult:
    """The record of one run.

    Args:
        config: of the run.
        outcome: what its session left.
        exactness: errors against the plain model, if they were measured.
        length: tokens a sequence for the count of FLOPs (default: the mean of what was trained on, else
            ``data.max_length``).

    Raises:
        ModelError: the model is of no known architecture.
    """
    owner = outcome.owner
    history: Mapping[str, Any] = owner.get("history", {})
    utility: Mapping[str, Any] = owner.get("utility", {})
    return RunResult(
        schema=1,
        design=config.design,
        model=config.model,
        data=DataSummary(train=config.data.train, validation=config.data.validation, **owner.get("data", {})),
        config=config.model_dump(mode="json"),
        fingerprint=config.run_fingerprint(),
        versions=versions(),
        machine=machine(),
        loss=history.get("loss", []),
        validation_loss=history.get("validation_loss", []),
        utility=measurements(utility.get("after", {})),
        utility_before=measurements(utility.get("before", {})),
        utility_emulator=measurements(utility.get("emulator", {})),
        emulator=_emulator(owner),
        correlation=owner.get("decorrelation", []),
        exactness=exactness or Exactness(),
        cost=_cost(config, outcome, history, length),
        simulated_enclave=is_simulated(outcome),
        labels=labels_of(config).model_copy(
            update={"public_ancestors": outcome.figures.get("provider", {}).get("public_ancestors", {})}
        ),
        answers=_answers(owner),
    )


def _emulator(owner: Mapping[str, Any]) -> EmulatorReport | None:
    """The emulator's card, and by how much the trunk does better than it."""
    card = owner.get("emulator")
    if card is None:
        return None
    utility = owner.get("utility", {})
    through, on = measurements(utility.get("after", {})), measurements(utility.get("emulator", {}))
    compressed = "" if card["compression"] in {"none", card["kind"]} else f", {card['compression']}"
    return EmulatorReport(
        kind=card["kind"] + compressed,
        layers=(card["trunk"][1] - card["trunk"][0], len(card["kept"])),
        parameter_share=card["parameter_share"],
        byte_share=card["byte_share"],
        largest_error=max(card["errors"].values(), default=0.0),
        margin={name: through[name].value - on[name].value for name in on if name in through},
    )


def is_simulated(outcome: Outcome) -> bool:
    """Whether any party was shown the evidence of an enclave that protects nothing."""
    return any(figures.get("enclave") == SIMULATED for figures in outcome.figures.values())


def labels_of(config: Config) -> Labels:
    """Reservations that follow from the configuration alone. Only a design with an enclave has secrets."""
    options = design_options(DESIGNS[config.design], config.design_options)
    seeded = config.lora.init_seed is not None or getattr(options, "key_seed", None) is not None
    rounded = config.dtype == "bfloat16" and resolve_device(config.device).type == "cpu"
    return Labels(
        reproducible_secrets=seeded and bool(DESIGNS[config.design].enclaves),
        bfloat16=None if config.dtype != "bfloat16" else "rounded" if rounded else "native",
    )


def count_shares(config: Config, model: Any, length: int) -> Shares | None:
    """The enclave's shares for the run's batch and this length; ``None`` for a design that is not accounted for.

    Args:
        config: of the run.
        model: its `transformers` configuration, as the provider's card has it: the source itself may be on another machine.
        length: tokens a sequence.
    """
    options: Any = design_options(DESIGNS[config.design], config.design_options)
    batch = config.train.batch_size
    if config.design in ACCOUNTED:
        placement: Placement = getattr(options, "placement", "compact")
        return shares(model, placement, batch, length, design=config.design)
    if config.design == "veil":
        cut = Cut.of(model, options.enclave_layers, options.enclave_top_layers)
        return veil_shares(model, cut, batch, length, inner=options.inner)
    return None


def _cost(config: Config, outcome: Outcome, history: Mapping[str, Any], length: int | None) -> Cost:
    engine: Mapping[str, Any] = outcome.owner.get("engine", {})
    seconds: list[float] = history.get("seconds", [])
    length = length or _mean_length(config, history)
    card: Mapping[str, Any] | None = outcome.owner.get("model")
    counted = None if card is None else count_shares(config, config_from_json(card["config"]), length)
    traffic = outcome.traffic
    return Cost(
        seconds_per_step=Spread.of(seconds) if seconds else None,
        bytes={pair: {kind: n["bytes"] for kind, n in kinds.items()} for pair, kinds in traffic.items()},
        messages={pair: {kind: n["messages"] for kind, n in kinds.items()} for pair, kinds in traffic.items()},
        bytes_per_step=_bytes_per_step(DESIGNS[config.design], traffic, engine),
        crossings_per_step=engine.get("crossings_per_step"),
        rounds=_rounds(traffic),
        peak_rss={role: figures["peak_rss"] for role, figures in outcome.figures.items() if "peak_rss" in figures},
        enclave=_enclave_cost(counted, engine),
        revealed_param_share=_revealed(counted, outcome),
    )


def _revealed(counted: Shares | None, outcome: Outcome) -> dict[str, float]:
    """Share of the provider's parameters that another party has in the clear: an emulator's count by its bytes."""
    share = outcome.owner.get("owner_share")
    if share is None:
        return {} if counted is None else {"host": counted.revealed_param_share}
    given = outcome.owner.get("emulator", {}).get("byte_share", 0.0)
    return {"owner": min(1.0, share + (1 - share) * given)}


def _enclave_cost(counted: Shares | None, engine: Mapping[str, Any]) -> EnclaveCost:
    spent = engine.get("engine_seconds", 0.0)
    working = None if not spent else min(1.0, max(0.0, 1 - engine.get("wait_seconds", 0.0) / spent))
    if counted is None or counted.design == "local":
        return EnclaveCost(seconds_share=None if "wait_seconds" not in engine else working)
    return EnclaveCost(
        param_share=counted.param_share,
        flop_share=counted.flop_share,
        seconds_share=working,
        checks=engine.get("checks"),
        check_seconds=engine.get("check_seconds"),
    )


def _mean_length(config: Config, history: Mapping[str, Any]) -> int:
    """Tokens a sequence, padding left out, rounded up."""
    sequences = history.get("step", 0) * config.train.batch_size * config.train.accumulate
    return math.ceil(history["tokens"] / sequences) if sequences else config.data.max_length


def _bytes_per_step(design: Design, traffic: Traffic, engine: Mapping[str, Any]) -> float | None:
    """Bytes of a training step: the owner's exchange with the engine, and what crossed the enclave's border for it.

    ``BatchLoss`` also answers evaluations; all of them have one size, so each batch trained on is given one.
    """
    if design.is_cut:  # the owner runs the engine itself: nothing is exchanged but over the cut
        return engine.get("border_bytes_per_step")
    found: dict[str, dict[str, int]] = {}
    for pair, kinds in traffic.items():
        if "owner" in pair.split("->"):  # with the optimiser on the host the same kinds also cross the border
            found.update(kinds)
    steps = found.get("OptimizerStep", {}).get("messages", 0)
    if not steps:
        return None
    owner_bytes = sum(found[kind]["bytes"] for kind in _STEP_KINDS)
    losses = found["BatchLoss"]
    owner_bytes += losses["bytes"] * found["TrainBatch"]["messages"] / losses["messages"]
    return owner_bytes / steps + engine.get("border_bytes_per_step", 0.0)


def _rounds(traffic: Traffic) -> int:
    """Requests that waited for an answer: on each link the smaller of the two directions' counts.

    What one side sends unasked (tokens as they come, contexts, farewells) makes the other direction the smaller one.
    """
    counts = {
        pair: sum(n["messages"] for kind, n in kinds.items() if kind != "Goodbye") for pair, kinds in traffic.items()
    }
    links = {tuple(sorted(pair.split("->"))) for pair in counts}
    return sum(min(counts.get(f"{a}->{b}", 0), counts.get(f"{b}->{a}", 0)) for a, b in links)


def _answers(owner: Mapping[str, Any]) -> list[Answer]:
    generated = owner.get("generated")
    return [] if generated is None else [Answer(prompt=generated["prompt"], text=generated["text"])]
