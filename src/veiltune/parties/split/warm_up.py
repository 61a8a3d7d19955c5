"""Decorrelation of the bottom before anything crosses: on the owner's own text, without the trunk and without a gradient of its.

*Symbols.* H₀ the states the bottom made as it came, H those it makes now, E the embeddings: each step lowers
α·dCor(E, H) + ‖H - H₀‖²/‖H₀‖². The second term keeps the states where the trunk expects them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from veiltune.batching import batches
from veiltune.errors import TrainingError
from veiltune.examples import TokenizedExample
from veiltune.models.bottom import Bottom
from veiltune.models.cut import Cut
from veiltune.parties.party import Party
from veiltune.parties.split.plan import WarmUpOptions
from veiltune.privacy.decorrelation import Decorrelation, DecorrelationOptions


def warm_up(
    party: Party,
    model: Any,
    cut: Cut,
    parameters: Sequence[torch.nn.Parameter],
    options: WarmUpOptions,
    examples: Sequence[TokenizedExample],
    *,
    pad_id: int,
) -> dict[str, float]:
    """Train the bottom's ``parameters``; returns dCor and fidelity at the first and at the last step.

    Raises:
        TrainingError: the objective became infinite or not a number.
    """
    config = party.config
    penalty = Decorrelation(DecorrelationOptions(alpha=options.alpha, samples=options.samples), seed=config.seed)
    chosen = list(batches(examples, config.train.batch_size, seed=config.seed, steps=options.steps, pad_id=pad_id))
    device = parameters[0].device
    tokens = [(batch.input_ids.to(device), batch.attention_mask.to(device)) for batch in chosen]
    embed, bottom = Bottom(model, 0), Bottom(model, cut.bottom_layers)
    model.eval()
    with torch.no_grad():
        before = [bottom.states(ids, mask) for ids, mask in tokens]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    trace: list[tuple[float, float]] = []
    for (ids, mask), old in zip(tokens, before, strict=True):
        hidden, real = bottom.states(ids, mask), mask.bool()
        fidelity = (hidden - old)[real].square().sum() / old[real].square().sum()
        objective = penalty.penalty(embed.states(ids, mask).detach(), hidden, mask) + fidelity
        if not torch.isfinite(objective):
            raise TrainingError(
                "the warm-up of the bottom diverged", hint="lower gradfree.warm_up.learning_rate or its alpha"
            )
        objective.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        penalty.advance()
        trace.append((penalty.last or 0.0, float(fidelity.detach())))
        party.report("warming_up", {"step": len(trace), "total_steps": options.steps, "correlation": trace[-1][0]})
    first, last = trace[0], trace[-1]
    return {"correlation_first": first[0], "correlation_last": last[0], "displacement_last": last[1]}
