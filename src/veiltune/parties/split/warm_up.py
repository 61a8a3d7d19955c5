"""Decorrelation of the bottom before anything crosses: on the owner's own text, without the trunk and without a gradient of its.

*Symbols.* H₀ the states the bottom made as it came, H those it makes now, E the embeddings: each step lowers
α·dCor(E, H) + ‖H - H₀‖²/‖H₀‖². The second term keeps the states where the trunk expects them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veiltune.batching import batches
from veiltune.errors import TrainingError
from veiltune.examples import TokenizedExample
from veiltune.models.trunk_stub import TrunkContext, TrunkStub
from veiltune.parties.party import Party
from veiltune.parties.split.plan import WarmUpOptions
from veiltune.privacy.decorrelation import Decorrelation, DecorrelationOptions


class _AtTheCutError(Exception):
    """A pass has come to the cut, and is to end there."""


class _Nowhere:
    """A port through which nothing goes."""

    def forward(self, hidden: Tensor, context: TrunkContext) -> tuple[int, Tensor]:  # noqa: ARG002
        raise _AtTheCutError

    def backward(self, ticket: int, gradient: Tensor) -> Tensor | None:  # noqa: ARG002
        raise _AtTheCutError


def warm_up(
    party: Party,
    model: Any,
    stub: TrunkStub,
    bottom: Sequence[torch.nn.Parameter],
    options: WarmUpOptions,
    examples: Sequence[TokenizedExample],
    *,
    pad_id: int,
) -> dict[str, float]:
    """Train the bottom's parameters ``bottom``; returns dCor and fidelity at the first and at the last step.

    Raises:
        TrainingError: the objective became infinite or not a number.
    """
    config = party.config
    penalty = Decorrelation(DecorrelationOptions(alpha=options.alpha, samples=options.samples), seed=config.seed)
    chosen = list(batches(examples, config.train.batch_size, seed=config.seed, steps=options.steps, pad_id=pad_id))
    device = bottom[0].device
    port, stub.port = stub.port, _Nowhere()
    model.eval()
    try:
        with torch.no_grad():
            before = [_states(model, stub, batch, device)[1] for batch in chosen]
        optimizer = torch.optim.AdamW(bottom, lr=options.learning_rate, weight_decay=0.0)
        trace: list[tuple[float, float]] = []
        for batch, old in zip(chosen, before, strict=True):
            embeddings, hidden, mask = _states(model, stub, batch, device)
            real = mask.bool()
            fidelity = (hidden - old)[real].square().sum() / old[real].square().sum()
            objective = penalty.penalty(embeddings.detach(), hidden, mask) + fidelity
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
    finally:
        stub.port = port
    first, last = trace[0], trace[-1]
    return {"correlation_first": first[0], "correlation_last": last[0], "displacement_last": last[1]}


def _states(model: Any, stub: TrunkStub, batch: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, states at the cut, and the mask of one batch, with the states' graph."""
    stub.observe = True
    try:
        getattr(model, model.base_model_prefix)(
            input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device), use_cache=False
        )
    except _AtTheCutError:
        pass
    finally:
        stub.observe = False
    observed = stub.take_observed()
    if observed is None:
        raise TrainingError("the pass did not come to the cut")
    return observed[0], observed[1], batch.attention_mask.to(device)
