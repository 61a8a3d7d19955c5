"""Shadow bottoms: what an owner's tuning may have made of its first layers, tried out on public text.

An attacker who knows that the owner tunes its layers, and with what objective, tunes a copy alike and learns from that. Snapshots
from the beginning to the end stand for owners at any moment of their tuning.

*Reference.* Shadow training as in membership inference (Shokri et al., arXiv 1610.05820), here of the layers below the cut.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from veiltune.attacks.passes import Agreement
from veiltune.attacks.remembered import learnt
from veiltune.config import LoraConfig
from veiltune.models.adapters import place_factors
from veiltune.models.bottom import Bottom
from veiltune.models.cut import Cut
from veiltune.models.families import find_family
from veiltune.models.skeleton import blocks_of
from veiltune.models.trainable import make_trainable
from veiltune.privacy.decorrelation import Decorrelation, DecorrelationOptions

BATCH, LENGTH = 8, 64
SNAPSHOTS = 4
MAX_NORM = 1.0


@dataclass(frozen=True)
class Tuning:
    """How the attacker takes the owner to tune: steps, weight of the distance correlation, LoRA rank, learning rate."""

    steps: int
    alpha: float
    rank: int
    learning_rate: float


class Shadows:
    """Bottoms at several moments of a tuning, the first of them the public one.

    Args:
        model: as it was before tuning; not changed.
        agreed: where it is cut.
        tuning: how a copy is tuned; with 0 steps there is the public bottom alone.
        corpus: tokenised public text to tune on.
        rng: of batches and first factors.
    """

    def __init__(
        self, model: nn.Module, agreed: Agreement, tuning: Tuning, corpus: Sequence[Sequence[int]], rng: torch.Generator
    ) -> None:
        self._bottom = Bottom(model, agreed.bottom_layers)
        self._snapshots: list[dict[str, Tensor]] = [{}]
        if tuning.steps:
            shadow: Any = copy.deepcopy(model)
            self._become(shadow, model, agreed, tuning, corpus, rng)
            self._bottom = Bottom(shadow, agreed.bottom_layers)

    @property
    def count(self) -> int:
        """How many bottoms there are."""
        return len(self._snapshots)

    @torch.no_grad()
    def states(self, ids: Int[Tensor, "batch seq"], which: int) -> Float[Tensor, "batch seq d"]:
        """States at the cut by one of the bottoms."""
        place_factors(self._bottom.model, self._snapshots[which])
        return self._bottom.states(ids)

    def _become(
        self,
        shadow: Any,
        model: nn.Module,
        agreed: Agreement,
        tuning: Tuning,
        corpus: Sequence[Sequence[int]],
        rng: torch.Generator,
    ) -> None:
        """Layers with factors in ``shadow``, a copy of ``model``, and snapshots of them."""
        family = find_family(shadow.config)
        cut = Cut.of(shadow.config, agreed.bottom_layers, agreed.top_layers)
        lora = LoraConfig(
            rank=tuning.rank, alpha=2.0 * tuning.rank, init_seed=int(torch.randint(1 << 31, (1,), generator=rng))
        )
        layers = cut.owner_layers
        factors = make_trainable(shadow, family, layers, lora, "lora", dtype=torch.float32, device=torch.device("cpu"))
        if not factors:
            return
        own = tuple(f"{family.blocks}.{layer}." for layer in cut.bottom)
        # of what was agreed on the wire plays no part: what is projected is not rounded yet
        what = ["shadow", tuning, agreed.bottom_layers, agreed.top_layers]
        tuned = partial(_tuned, shadow, factors, own, agreed, tuning, corpus, rng)
        self._snapshots = learnt(what, model, corpus, rng, tuned)


def _tuned(
    shadow: Any,
    factors: dict[str, nn.Parameter],
    own: tuple[str, ...],
    agreed: Agreement,
    tuning: Tuning,
    corpus: Sequence[Sequence[int]],
    rng: torch.Generator,
) -> list[dict[str, Tensor]]:
    """Tune ``factors``; snapshots of those whose names begin with ``own``, from before the first step to after the last."""
    penalty = Decorrelation(DecorrelationOptions(alpha=tuning.alpha), seed=0)
    optimizer = torch.optim.AdamW(factors.values(), lr=tuning.learning_rate, weight_decay=0.0)
    kept = {round(tuning.steps * part / SNAPSHOTS) for part in range(1, SNAPSHOTS + 1)}
    snapshots = [_copied(factors, own)]
    for step in range(1, tuning.steps + 1):
        loss = _loss(shadow, agreed, _batch(corpus, rng), penalty)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors.values(), MAX_NORM)
        optimizer.step()
        penalty.advance()
        if step in kept:
            snapshots.append(_copied(factors, own))
    return snapshots


def _copied(factors: dict[str, nn.Parameter], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in factors.items() if name.startswith(prefixes)}


def _batch(corpus: Sequence[Sequence[int]], rng: torch.Generator) -> list[Tensor]:
    chosen = torch.randint(len(corpus), (BATCH,), generator=rng).tolist()
    return [torch.tensor(list(corpus[index][:LENGTH])) for index in chosen]


def _loss(shadow: Any, agreed: Agreement, texts: list[Tensor], penalty: Decorrelation) -> Float[Tensor, ""]:
    """The owner's objective, L = L_task + α·dCor(E, H), with the next token of public text for a task."""
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    labels = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)
    seen: dict[int, Tensor] = {}

    def keeper(index: int) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[index] = args[0] if args else kwargs["hidden_states"]

        return keep

    blocks = blocks_of(shadow, find_family(shadow.config))
    handles = [
        blocks[index].register_forward_pre_hook(keeper(index), with_kwargs=True) for index in {0, agreed.bottom_layers}
    ]
    try:
        logits = shadow(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return loss + penalty.penalty(seen[0].detach(), agreed.projected(seen[agreed.bottom_layers]), (labels >= 0).long())
