"""Vocabulary matching: for each state at the cut, the token whose own state is nearest, left to right.

*Reference.* The attack on permuted and plain states of "Hidden No More" (arXiv 2505.18332), on whole states here. States are
causal: once the tokens before a position are known, only as many states are possible there as there are tokens. Candidates are
computed through the public bottom with a KV cache and rounded as the wire rounds. A linear map from states to embeddings,
fitted to random tokens through that bottom, leaves a shortlist to compute.

*Bound.* Without noise the right candidate is at the distance of rounding errors. What moves the bottom (tuning, decorrelation)
moves the right one away; with a beam a wrong token is not final.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune.attacks.base import Attack, Auxiliary, EmbeddingTable, Knowledge, Reconstruction, provider_reads
from veiltune.attacks.passes import Agreement, agreement_of, joined, smashed_states
from veiltune.attacks.view import View
from veiltune.models.bottom import Bottom

ROWS = 512  # candidates computed at a time
FIT_TOKENS_PER_CHANNEL = 6
FIT_LENGTH = 32
RIDGE = 1e-3


@dataclass(frozen=True)
class VocabularyMatching(Attack):
    """See the module. ``shortlist`` candidates are computed a position, and ``beam`` prefixes are kept."""

    name: ClassVar[str] = "vocabulary_matching"
    summary: ClassVar[str] = "nearest state through the public bottom, token by token"
    observer: ClassVar[str] = "provider"
    against: ClassVar = provider_reads()
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"base_weights"})
    cost: ClassVar[str] = "shortlist x beam passes through the bottom a token; minutes for a few sequences on two cores"

    shortlist: int = 64
    beam: int = 1

    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """See `Attack.run`."""
        agreed = agreement_of(view)
        bottom = Bottom(auxiliary.take("base_weights"), agreed.bottom_layers)
        shortlist = self.shortlist if bottom.vocab_size > ROWS else bottom.vocab_size  # so few can all be computed
        search = _Search(bottom, agreed, min(shortlist, bottom.vocab_size), self.beam)
        search.fit(rng)
        return Reconstruction(tokens=search.all(joined(smashed_states(view))))


class _Search:
    """Beam search of the tokens behind states, over many sequences at once."""

    def __init__(self, bottom: Bottom, agreed: Agreement, shortlist: int, beam: int) -> None:
        self.bottom = bottom
        self.agreed = agreed
        self.shortlist = shortlist
        self.beam = beam
        self._table = EmbeddingTable(bottom.model)
        self._firsts: Tensor | None = None
        self._candidates: Callable[[Tensor, int], Tensor] = lambda _states, _position: torch.empty(0)

    @torch.no_grad()
    def fit(self, rng: torch.Generator) -> None:
        """The shortlist's linear map: states at the cut to embeddings, by ridge regression over random tokens."""
        count = max(2, FIT_TOKENS_PER_CHANNEL * self.bottom.width // FIT_LENGTH)
        ids = torch.randint(self.bottom.vocab_size, (count, FIT_LENGTH), generator=rng)
        states = torch.cat([self._seen(part) for part in ids.split(max(1, ROWS // FIT_LENGTH))])[:, 1:].flatten(0, 1)
        tokens = ids[:, 1:].flatten()
        positions = torch.arange(1, FIT_LENGTH).repeat(count)
        wanted = self._table.states(tokens, positions, "raw")
        centre, target = states.mean(0), wanted.mean(0)
        x, y = (states - centre).double(), (wanted - target).double()
        gram = x.T @ x
        gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()))
        weights = torch.linalg.solve(gram, x.T @ y).float()
        every = torch.arange(self.bottom.vocab_size)
        tables: dict[int, Tensor] = {}

        def candidates(seen: Tensor, position: int) -> Tensor:
            place = position if self._table.has_positions else 0
            if place not in tables:
                tables.clear()
                raw = self._table.states(every, torch.full_like(every, place), "raw") - target
                tables[place] = torch.nn.functional.normalize(raw, dim=-1)
            guess = torch.nn.functional.normalize((seen - centre) @ weights, dim=-1)
            return (guess @ tables[place].T).topk(self.shortlist, dim=-1).indices

        self._candidates = candidates

    def _seen(self, ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d"]:
        return self.agreed.rounded(self.bottom.states(ids), starts=True)

    @torch.no_grad()
    def all(self, sequences: Sequence[Float[Tensor, "_ d"]]) -> list[list[int]]:
        """The tokens of every sequence, a few sequences at a time, those of like length together."""
        size = max(1, ROWS // (self.shortlist * self.beam))
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        found: list[list[int]] = [[] for _ in sequences]
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for index, tokens in zip(chosen, self._some([sequences[i] for i in chosen]), strict=True):
                found[index] = tokens[: len(sequences[index])]
        return found

    def _some(self, sequences: Sequence[Tensor]) -> list[list[int]]:
        from transformers import DynamicCache

        states = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        count, width = len(states), self.beam
        cache: Any = DynamicCache()
        costs = torch.full((count, width), torch.inf)
        costs[:, 0] = 0.0
        tokens = torch.zeros((count, width, 0), dtype=torch.int64)
        for position in range(states.shape[1]):
            seen = states[:, position]
            candidates = self._place_first(self._candidates(seen, position), position, seen)
            distances = self._distances(candidates, seen, cache, position)
            totals = (costs[..., None] + distances).flatten(1)
            costs, best = totals.topk(width, largest=False)
            prefix, which = best // self.shortlist, best % self.shortlist
            chosen = candidates.gather(1, which)
            tokens = torch.cat([tokens.gather(1, prefix[..., None].expand_as(tokens)), chosen[..., None]], dim=2)
            self._keep(cache, best, count)
        return tokens[:, 0].tolist()

    def _place_first(self, candidates: Tensor, position: int, seen: Tensor) -> Tensor:
        """The first position's state is an outlier that the linear map, fitted without it, may miss: try every token there."""
        if position or self.bottom.layers == 0:
            return candidates
        if self._firsts is None:
            parts = torch.arange(self.bottom.vocab_size)[:, None].split(4 * ROWS)
            self._firsts = torch.cat([self._seen(part)[:, 0] for part in parts])
        return torch.cdist(seen, self._firsts).topk(self.shortlist, largest=False).indices

    def _distances(
        self, candidates: Int[Tensor, "count k"], seen: Float[Tensor, "count d"], cache: Any, position: int
    ) -> Float[Tensor, "count beam k"]:
        """Squared distances of each candidate's state after each kept prefix, relative to the state's own square."""
        count, k = candidates.shape
        prefixes = self.beam if position else 1
        if position and self.bottom.layers:
            cache.batch_repeat_interleave(k)
        ids = candidates[:, None].expand(count, prefixes, k).reshape(-1, 1)
        place = torch.full_like(ids, position)
        states = self.bottom.states(ids, position_ids=place, cache=cache if self.bottom.layers else None)
        states = self.agreed.rounded(states, starts=position == 0).view(count, prefixes, k, -1)
        squares = (states - seen[:, None, None]).square().sum(-1) / seen.square().sum(-1)[:, None, None].clamp_min(
            1e-30
        )
        return squares if prefixes == self.beam else squares.expand(count, self.beam, k)

    def _keep(self, cache: Any, best: Int[Tensor, "count beam"], count: int) -> None:
        """Of the candidates' caches those of the prefixes that are kept."""
        if not self.bottom.layers:
            return
        per_sequence = len(cache.layers[0].keys) // count
        rows = torch.arange(count)[:, None] * per_sequence + best % per_sequence
        cache.batch_select_indices(rows.flatten())
