"""Vocabulary matching: for each state at the cut, the token whose own state is nearest, left to right.

*Reference.* The attack on permuted and plain states of "Hidden No More" (arXiv 2505.18332), on whole states here. States are
causal: once the tokens before a position are known, only as many states are possible there as there are tokens. Candidates are
computed through the public bottom with a KV cache and rounded as the wire rounds. A linear map from states to embeddings leaves a
shortlist to compute (`attacks.shortlist`).

*Bound.* Without noise the right candidate is at the distance of rounding errors. What moves the bottom (tuning, decorrelation)
moves the right one away; with a beam a wrong token is not final. ``rounds`` more searches follow the first, each through a bottom
that is corrected by what the one before found (`attacks.adapting`): against an owner's bottom that the attacker does not have,
bottlenecks and noise. In these distances are log-likelihoods, and ``prior`` weighs the model's own log-probabilities beside them.

*Gaps.* Of positions that were not sent nothing is matched. Those behind them are, each at its true position, after a prefix made
of what was guessed of the ones that were sent: approximately, for the true prefix is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune.attacks.adapting import Channel
from veiltune.attacks.base import Attack, Auxiliary, Knowledge, Reconstruction, provider_reads, setting
from veiltune.attacks.fluency import Fluency
from veiltune.attacks.passes import Agreement, agreement_of, has_gaps, joined, places_in, smashed_states, spread
from veiltune.attacks.shortlist import Shortlist
from veiltune.attacks.view import View
from veiltune.models.bottom import Bottom
from veiltune.study_terms import Knows

ROWS = 512  # candidates computed at a time
FLUENT = 4
"""One in so many candidates comes from the prior, where there is one."""


@dataclass(frozen=True)
class VocabularyMatching(Attack):
    """See the module. ``shortlist`` candidates are computed a position, and ``beam`` prefixes are kept."""

    name: ClassVar[str] = "vocabulary_matching"
    summary: ClassVar[str] = "nearest state through the public bottom, token by token"
    observer: ClassVar[str] = "provider"
    against: ClassVar = provider_reads()
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"base_weights"})
    knows: ClassVar[Knows] = "nothing"
    cost: ClassVar[str] = "shortlist x beam passes through the bottom a token; minutes for a few sequences on two cores"

    shortlist: int = 64
    beam: int = 1
    rounds: int = setting(0, least=0)
    prior: float = 0.0

    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """See `Attack.run`."""
        agreed = agreement_of(view)
        bottom = Bottom(auxiliary.take("base_weights"), agreed.bottom_layers)
        passes = smashed_states(view)
        places = places_in(passes)
        settings = {"shortlist": self.shortlist, "beam": self.beam, "rounds": self.rounds, "prior": self.prior}
        found = match_states(bottom, agreed, joined(passes), rng, **settings, places=places)
        return Reconstruction(tokens=[spread(*each) for each in zip(found, places, strict=True)])


def match_states(  # noqa: PLR0913 - the search's settings, by name
    bottom: Bottom,
    agreed: Agreement,
    sequences: Sequence[Float[Tensor, "_ k"]],
    rng: torch.Generator,
    *,
    shortlist: int,
    beam: int = 1,
    rounds: int = 0,
    prior: float = 0.0,
    places: Sequence[Int[Tensor, " _"]] | None = None,
) -> list[list[int]]:
    """The token behind each of the states of sequences; ``places``: where in their texts these stand, if they do not count."""
    gaps = places if places is not None and has_gaps(places) else None
    stand = gaps or [torch.arange(len(each)) for each in sequences]
    shortlist = shortlist if bottom.vocab_size > ROWS else bottom.vocab_size  # so few can all be computed
    shortlist, channel = min(shortlist, bottom.vocab_size), Channel(bottom, agreed)
    tokens = _Search(channel, shortlist, beam, rng).all(sequences, stand)
    for _ in range(rounds):
        channel.adapt(sequences, tokens, gaps)
        tokens = _Search(channel, shortlist, beam, rng, prior).all(sequences, stand)
    return tokens


class _Search:
    """Beam search of the tokens behind states, over many sequences at once."""

    def __init__(self, channel: Channel, shortlist: int, beam: int, rng: torch.Generator, prior: float = 0.0) -> None:
        self.channel = channel
        self.bottom = channel.bottom
        self.shortlist = shortlist
        self.beam = beam
        self.prior = prior
        self._linear = Shortlist(channel, rng)

    @torch.no_grad()
    def all(self, sequences: Sequence[Float[Tensor, "_ k"]], places: Sequence[Int[Tensor, " _"]]) -> list[list[int]]:
        """The tokens of every sequence, a few sequences at a time, those of like length together."""
        size = max(1, ROWS // (self.shortlist * self.beam))
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        found: list[list[int]] = [[] for _ in sequences]
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            some = self._some([sequences[i] for i in chosen], [places[i] for i in chosen])
            for index, tokens in zip(chosen, some, strict=True):
                found[index] = tokens[: len(sequences[index])]
        return found

    def _some(self, sequences: Sequence[Tensor], places: Sequence[Tensor]) -> list[list[int]]:
        from transformers import DynamicCache

        states = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        lengths = torch.tensor([len(each) for each in sequences])
        stand = torch.arange(states.shape[1]).repeat(len(states), 1)
        for row, each in zip(stand, places, strict=True):
            row[: len(each)] = each
        count, width = len(states), self.beam
        cache: Any = DynamicCache()
        fluency = Fluency(self.bottom.model, count * width) if self.prior else None
        costs = torch.full((count, width), torch.inf)
        costs[:, 0] = 0.0
        tokens = torch.zeros((count, width, 0), dtype=torch.int64)
        for position in range(states.shape[1]):
            seen = states[:, position]
            following = None if fluency is None or fluency.next is None else fluency.next.view(count, width, -1)
            candidates = self._candidates(seen, stand[:, position], following)
            distances = self._distances(candidates, seen, cache, stand[:, position])
            if following is not None:
                distances = distances / 2 - self.prior * following.gather(2, candidates[:, None].expand_as(distances))
            distances[lengths <= position] = 0.0  # beyond its end a sequence only waits for the longer ones
            totals = (costs[..., None] + distances).flatten(1)
            costs, best = totals.topk(width, largest=False)
            prefix, which = best // self.shortlist, best % self.shortlist
            chosen = candidates.gather(1, which)
            tokens = torch.cat([tokens.gather(1, prefix[..., None].expand_as(tokens)), chosen[..., None]], dim=2)
            self._keep(cache, best, count)
            if fluency is not None:
                parents = torch.arange(count)[:, None] * width + prefix
                fluency.extend(parents.flatten(), chosen.flatten())
        return tokens[:, 0].tolist()

    def _candidates(
        self, seen: Float[Tensor, "count k"], places: Int[Tensor, " count"], following: Tensor | None
    ) -> Int[Tensor, "count shortlist"]:
        """Tokens to compute: by the linear map, and some that the best prefix makes likely."""
        if following is None or self.shortlist == self.bottom.vocab_size:
            return self._near(seen, places, self.shortlist)
        fluent = self.shortlist // FLUENT
        near = self._near(seen, places, self.shortlist - fluent)
        rest = following[:, 0].scatter(1, near, -torch.inf)
        return torch.cat([near, rest.topk(fluent, dim=-1).indices], dim=1)

    def _near(
        self, seen: Float[Tensor, "count k"], places: Int[Tensor, " count"], number: int
    ) -> Int[Tensor, "count number"]:
        """The linear map's likeliest; it asks where a state stands only of first ones, and where positions are learned."""
        kinds = places if self.bottom.has_positions else places.clamp_max(1)
        found = torch.zeros((len(seen), number), dtype=torch.int64)
        for kind in kinds.unique().tolist():
            found[kinds == kind] = self._linear.tokens(seen[kinds == kind], kind, number)
        return found

    def _distances(
        self, candidates: Int[Tensor, "count n"], seen: Float[Tensor, "count k"], cache: Any, places: Tensor
    ) -> Float[Tensor, "count beam n"]:
        """How far each candidate's state after each kept prefix is from what was seen, each at its place."""
        count, k = candidates.shape
        position = int(places[0])  # 0 for all sequences or for none: the first is always sent
        prefixes = self.beam if position else 1
        if position and self.bottom.layers:
            cache.batch_repeat_interleave(k)
        ids = candidates[:, None].expand(count, prefixes, k).reshape(-1, 1)
        place = places[:, None, None].expand(count, prefixes, k).reshape(-1, 1)
        states = self.bottom.states(ids, position_ids=place, cache=cache if self.bottom.layers else None)
        states = self.channel.seen(states, starts=position == 0).view(count, prefixes, k, -1)
        squares = self.channel.distances(states, seen[:, None, None])
        return squares if prefixes == self.beam else squares.expand(count, self.beam, k).clone()

    def _keep(self, cache: Any, best: Int[Tensor, "count beam"], count: int) -> None:
        """Of the candidates' caches those of the prefixes that are kept."""
        if not self.bottom.layers:
            return
        per_sequence = len(cache.layers[0].keys) // count
        rows = torch.arange(count)[:, None] * per_sequence + best % per_sequence
        cache.batch_select_indices(rows.flatten())
