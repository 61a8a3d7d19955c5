"""Which tokens may stand behind a state at the cut, by a linear map from what crossed to embeddings.

The map is fitted by ridge regression to tokens through the public bottom: half of them random, so that it names any token of
the vocabulary, half in texts that the model writes itself, since a token in a sentence has other states than one among strangers.
Where the noise on the wire was estimated, its covariance is the ridge: the same as fitting to noisy states.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from veiltune.attacks.adapting import Channel, ridged
from veiltune.attacks.base import EmbeddingTable
from veiltune.attacks.fluency import written

TOKENS_PER_CHANNEL = 6
LENGTH = 32
ROWS = 512  # tokens through the bottom at a time
RIDGE = 1e-3


class Shortlist:
    """The linear map, and the scores of all tokens by it.

    Args:
        channel: from tokens to what crosses.
        rng: draws the random tokens.
    """

    def __init__(self, channel: Channel, rng: torch.Generator) -> None:
        self._table = EmbeddingTable(channel.bottom.model)
        self._every = torch.arange(channel.bottom.vocab_size)
        self._tables: dict[int, Tensor] = {}
        self._channel = channel
        self._firsts: Tensor | None = None
        self._fit(channel, rng)

    @torch.no_grad()
    def _fit(self, channel: Channel, rng: torch.Generator) -> None:
        bottom = channel.bottom
        count = max(2, TOKENS_PER_CHANNEL * bottom.width // LENGTH)
        ids = torch.randint(bottom.vocab_size, (count - count // 2, LENGTH), generator=rng)
        ids = torch.cat([ids, written(bottom.model, count // 2, LENGTH)])
        parts = [channel.seen(bottom.states(part), starts=True) for part in ids.split(max(1, ROWS // LENGTH))]
        states = torch.cat(parts)[:, 1:].flatten(0, 1)
        positions = torch.arange(1, LENGTH).repeat(count)
        wanted = self._table.states(ids[:, 1:].flatten(), positions, "raw")
        self._centre, self._target = states.mean(0), wanted.mean(0)
        x, y = (states - self._centre).double(), (wanted - self._target).double()
        gram = ridged(x.T @ x, RIDGE)
        if channel.correction is not None:
            gram += len(x) * channel.correction.covariance.double()
        self._weights = torch.linalg.solve(gram, x.T @ y).float()

    def embedding(self, seen: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        """The embedding, as it enters the first block, that each state points to."""
        return (seen - self._centre) @ self._weights + self._target

    def scores(self, seen: Float[Tensor, "n k"], position: int) -> Float[Tensor, "n v"]:
        """Cosine of every token's embedding at ``position`` with what each state points to."""
        place = position if self._table.has_positions else 0
        if place not in self._tables:
            self._tables.clear()
            raw = self._table.states(self._every, torch.full_like(self._every, place), "raw") - self._target
            self._tables[place] = normalize(raw, dim=-1)
        return normalize(self.embedding(seen) - self._target, dim=-1) @ self._tables[place].T

    @torch.no_grad()
    def tokens(self, seen: Float[Tensor, "n k"], position: int, count: int) -> Int[Tensor, "n count"]:
        """The ``count`` likeliest tokens of each state, best first.

        The first position's state is an outlier that the linear map, fitted without it, may miss: every token is tried there.
        """
        if position or self._channel.bottom.layers == 0:
            return self.scores(seen, position).topk(count, dim=-1).indices
        if self._firsts is None:
            parts = self._every[:, None].split(4 * ROWS)
            states = [self._channel.seen(self._channel.bottom.states(part), starts=True)[:, 0] for part in parts]
            self._firsts = torch.cat(states)
        return torch.cdist(seen, self._firsts).topk(count, largest=False).indices
