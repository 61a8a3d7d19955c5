"""DAGER: tokens whose states lie in the span that a gradient shows, then the sequences that their next layer's states allow.

*Reference.* "DAGER: Exact Gradient Inversion for Large Language Models" (arXiv 2405.15586), for decoders. *First layer*: a token
of the text has its first state in the span of the first block's gradient; of all others next to none do. *Second layer*: a
prefix of the text has its state after the first block in the span of the second block's gradient, so sequences are grown from the
tokens found, prefix by prefix. No optimisation, no prior, any batch.

*Bound.* Exact while the span is not the whole space: fewer tokens in a step than channels (full gradients), or no more than the
rank of the factors (LoRA). Below that rank a block's Q, K and V each give their own part of the span; the sum of their ranks
counts. Tuning moves what comes out of the first block: the second check knows it as it was before.

*Under a key* the span is that of X·R, which no token's state is in. With ``key = "ancestor"`` R is estimated first.

*What no gradient holds.* Nothing is predicted at a text's last token and nothing attends to it, so its gradient is zero. It is
taken for the end token, which it is unless the text was cut. Rows of a batch are told apart by their lengths alone: a sum over
rows does not say which was which, so among equally long ones the order is arbitrary, and is not scored.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune.attacks.base import Attack, Auxiliary, EmbeddingTable, Knowledge, Reconstruction
from veiltune.attacks.gradients import (
    GRADIENTS,
    KeyFrom,
    Step,
    attention_inputs,
    basis_of,
    input_keys,
    input_rows,
    plain_step,
    residuals,
    steps_of,
)
from veiltune.attacks.view import View
from veiltune.models.bottom import Bottom
from veiltune.models.skeleton import blocks_of
from veiltune.study_terms import Knows, Phase

ROWS = 4096  # tokens that go through the first block at a time
WIDTH = 8
"""Prefixes kept for each sequence of a step: a token again and again has the state it has alone, so some false ones fit."""
ROUNDING = 5e-3
"""Residuals below this are none: they are square roots of rounding errors."""
ALIKE = 4.0
"""How many times the best one's residual a prefix may have to fit as well: tuning moves the true ones too."""


@dataclass(frozen=True)
class _Prefix:
    """The first tokens of a text, and the largest residual of their states."""

    tokens: list[int]
    worst: float


@dataclass(frozen=True)
class Dager(Attack):
    """See the module.

    ``tolerance``: what of a state may lie outside the span. ``candidates``: tokens kept a position (or of all, where positions
    are rotary) at most. ``key``: whether R is estimated, from an ancestor at ``distance``.
    """

    name: ClassVar[str] = "dager"
    summary: ClassVar[str] = "tokens and prefixes whose states are in the span of the gradients"
    observer: ClassVar[str] = "host"
    against: ClassVar = GRADIENTS
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"base_weights", "public_ancestor"})
    knows: ClassVar[Knows] = "public_ancestor"
    phases: ClassVar[frozenset[Phase]] = frozenset({"tuning"})
    cost: ClassVar[str] = (
        "the vocabulary against one span, and candidates x tokens tokens through one block a text; seconds"
    )
    leaky_settings: ClassVar[Mapping[str, Any]] = {"key": "none"}

    tolerance: float = 0.1
    candidates: int = 1024
    key: KeyFrom = "none"
    distance: float = 0.0

    @torch.no_grad()
    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:  # noqa: ARG002
        """See `Attack.run`."""
        search = SpanSearch(auxiliary.take("base_weights"), self.tolerance, self.candidates)
        keys: Mapping[str, Tensor] = {}
        if self.key == "ancestor":
            keys = input_keys(view, auxiliary.take("public_ancestor"), search.family, search.readers)
        tokens: list[list[int]] = []
        alike: list[list[int]] = []
        for step in steps_of(view):
            found = search.sequences(plain_step(step, keys, search.readers))
            alike += _equally_long(step, len(tokens))
            tokens += [found[index] for index in step.wanted]
        return Reconstruction(tokens=tokens, alike=alike)


class SpanSearch:
    """The search of one model's texts behind spans.

    Args:
        model: the causal language model in the clear.
        tolerance: see `Dager`, like ``candidates``.
        candidates: of each position.
    """

    def __init__(self, model: Any, tolerance: float, candidates: int) -> None:
        self.config: Any = model.config
        self.tolerance = tolerance
        self.candidates = candidates
        self.bottom = Bottom(model, 1)
        self.family = self.bottom.family
        self.readers = [linear for block in (0, 1) for linear in attention_inputs(self.family, self.config, block)]
        self._table = EmbeddingTable(model)
        self._second_norm = blocks_of(model, self.family)[1].get_submodule(self.family.attention.norm)

    @torch.no_grad()
    def sequences(self, step: Step) -> list[list[int]]:
        """The tokens of every sequence of a step (its keys taken off), in the order of its lengths."""
        spans = [self.span(step, block) for block in (0, 1)]
        end = self.end_of(self.config)
        if spans[0] is None or spans[1] is None:  # the first step's lora_A, whose gradient is zero while lora_B is
            return [[end] * length for length in step.lengths]
        tokens = self._tokens(spans[0], step.lengths)
        found: list[list[int]] = [[] for _ in step.lengths]
        levels = self._grown(tokens, spans[1], max(step.lengths) - 1, len(step.lengths))
        taken: list[list[int]] = []
        for index in sorted(range(len(found)), key=lambda i: -step.lengths[i]):
            prefix = _untaken(levels[step.lengths[index] - 1], taken)
            taken.append(prefix)
            found[index] = [*prefix, end]
        return found

    @staticmethod
    def end_of(config: Any) -> int:
        """The token that a text ends with, as far as the public configuration says."""
        end = config.eos_token_id
        return int(end[0] if isinstance(end, list) else end or 0)

    def inside(self, step: Step) -> Int[Tensor, " c"] | None:
        """Tokens within tolerance of the first span at any position of a text; ``None`` if there is none."""
        span = self.span(step, 0)
        if span is None:
            return None
        found = torch.cat(self._tokens(span, step.lengths)).unique()
        return found if len(found) else None

    def span(self, step: Step, block: int) -> Float[Tensor, "k d"] | None:
        """What a block's attention read, as far as the gradients show."""
        readers = [linear for linear in self.readers if linear.block == block]
        rows = input_rows(step.gradients, readers, self.family)
        return None if rows is None else basis_of(rows, sum(step.lengths) - len(step.lengths))

    def first_residuals(self, span: Float[Tensor, "k d"], position: int) -> Float[Tensor, " v"]:
        """How far each token of the vocabulary is from the first block's span, if it stands at this position."""
        every = torch.arange(self.bottom.vocab_size)
        states = self._table.states(every, torch.full_like(every, position), "normed")
        return residuals(states, span)

    def _tokens(self, span: Float[Tensor, "k d"], lengths: list[int]) -> list[Tensor]:
        """Candidates of each position: those within tolerance, else as many of the nearest as there are tokens."""
        places = max(lengths) - 1 if self._table.has_positions else 1
        chosen: list[Tensor] = []
        for position in range(max(1, places)):
            distances = self.first_residuals(span, position)
            inside = int((distances < self.tolerance).sum())
            least = sum(length > position + 1 for length in lengths) if self._table.has_positions else sum(lengths)
            count = min(inside or least, self.candidates, len(distances))
            chosen.append(distances.topk(count, largest=False).indices)
        return chosen if self._table.has_positions else chosen * (max(lengths) - 1)

    def _grown(self, tokens: list[Tensor], span: Float[Tensor, "k d"], depth: int, rows: int) -> list[list[_Prefix]]:
        """By length, the prefixes whose states are all in the second span, the best first; else the ``rows`` best."""
        levels = [[_Prefix([], 0.0)]]
        grown = _Grown(self.bottom)
        for position in range(depth):
            count = len(tokens[position])
            last = residuals(self._second_norm(grown.longer(tokens[position])), span)
            worst = last.maximum(torch.tensor([each.worst for each in levels[-1]])[:, None]).flatten()
            inside = int((worst < self.tolerance).sum())
            kept = worst.topk(min(max(inside, rows), WIDTH * rows, len(worst)), largest=False).indices
            parents, chosen = kept // count, tokens[position][kept % count]
            grown.keep(parents, chosen)
            pairs = zip(parents.tolist(), chosen.tolist(), worst[kept].tolist(), strict=True)
            levels.append([_Prefix([*levels[-1][i].tokens, token], residual) for i, token, residual in pairs])
        return levels


class _Grown:
    """Prefixes with what the first block keeps of them, so that a longer one costs one token."""

    def __init__(self, bottom: Bottom) -> None:
        from transformers import DynamicCache

        self._bottom = bottom
        self._cache: Any = DynamicCache()
        self._length, self._rows = 0, 1

    def longer(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "rows n d"]:
        """The last state of each prefix with each token after it."""
        at_once = max(1, ROWS // len(tokens))
        parts = [self._after(part, tokens) for part in torch.arange(self._rows).split(at_once)]
        return torch.cat(parts).view(self._rows, len(tokens), -1)

    def keep(self, parents: Int[Tensor, " n"], tokens: Int[Tensor, " n"]) -> None:
        """Each prefix becomes that of ``parents`` with one more token."""
        self._select(self._cache, parents)
        self._states(tokens, self._cache)
        self._length, self._rows = self._length + 1, len(tokens)

    def _after(self, rows: Int[Tensor, " r"], tokens: Int[Tensor, " n"]) -> Float[Tensor, "rn d"]:
        cache = copy.deepcopy(self._cache)
        self._select(cache, rows.repeat_interleave(len(tokens)))
        return self._states(tokens.repeat(len(rows)), cache)

    def _select(self, cache: Any, rows: Int[Tensor, " n"]) -> None:
        if self._length:
            cache.batch_select_indices(rows)

    def _states(self, tokens: Int[Tensor, " n"], cache: Any) -> Float[Tensor, "n d"]:
        place = torch.full((len(tokens), 1), self._length)
        return self._bottom.states(tokens[:, None], position_ids=place, cache=cache)[:, 0]


def _equally_long(step: Step, start: int) -> list[list[int]]:
    """Numbers of a step's wanted sequences, counted from ``start``, in groups of one length."""
    groups: dict[int, list[int]] = {}
    for number, index in enumerate(step.wanted, start):
        groups.setdefault(step.lengths[index], []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def _untaken(prefixes: list[_Prefix], taken: list[list[int]]) -> list[int]:
    """Of the prefixes that no longer text begins with and that fit alike, the one with most tokens that none taken has.

    Every token found stands somewhere, and of equals the first fits best.
    """
    free = [each for each in prefixes if not any(each.tokens == other[: len(each.tokens)] for other in taken)]
    free = free or prefixes[:1]
    alike = max(ROUNDING, ALIKE * min(each.worst for each in free))
    used = {token for other in taken for token in other}
    fitting = [each.tokens for each in free if each.worst <= alike]
    return max(fitting, key=lambda tokens: len(set(tokens) - used))
