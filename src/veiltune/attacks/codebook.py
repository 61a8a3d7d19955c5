"""Codebook: which states are equal, how often each occurs and beside which others, against a public corpus's statistics.

1. Equal states of the whole transcript are one symbol of a cipher (with learned positions: of one position). Where no states are
   equal, as after a block in the enclave, the nearest ones are taken together, as many groups as so much public text has tokens.
2. Symbols meet tokens by frequency. Then what stands to the left and right of each is counted, as far as it is decided, in the
   transcript and in the corpus; symbols are assigned again by these contexts and frequencies together, and the more frequent
   half of what was decided decides the next round. Nothing else of a state is read than whether it equals (is near) another.

*Controls.* Leaky: the corpus is the victim's own text, and no block is in the enclave. To take the key away would change
nothing, as equal states stay equal under any key. Shuffled: as everywhere.

*Reference.* Reading substitution ciphers by n-gram statistics: Jakobsen, "A fast method for cryptanalysis of substitution
ciphers" (1995). The assignment by contexts is ours.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from veiltune.attacks.base import Attack, Auxiliary, EmbeddingTable, Knowledge, Reconstruction
from veiltune.attacks.inside import assigned
from veiltune.attacks.passes import FIRST_STATES, every_row, joined, masked_first_states
from veiltune.attacks.view import View
from veiltune.study_terms import Knows

SAME = 1e-4
"""Distance, relative to the norm, below which two states are equal: rounding errors of a product in float32."""
TOO_MANY = 2.0
"""So many times the symbols of so much public text say that states are not single tokens'. Then near ones are taken for equal."""


@dataclass(frozen=True)
class Codebook(Attack):
    """See the module. ``rows`` states are read, ``rounds`` of contexts counted, ``vocabulary`` tokens of the corpus tried."""

    name: ClassVar[str] = "codebook"
    summary: ClassVar[str] = "equal first states as a substitution cipher, read by the frequencies of public text"
    observer: ClassVar[str] = "host"
    against: ClassVar = FIRST_STATES
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"embedding_table", "corpus"})
    knows: ClassVar[Knows] = "public_text"
    cost: ClassVar[str] = "distances of all states and an assignment of symbols to tokens a round; a minute"
    control: ClassVar[tuple[str, float]] = ("token_recovery", 0.6)
    leaky_knows_text: ClassVar[bool] = True
    leaky_layers: ClassVar[int | None] = 0

    rows: int = 4096
    rounds: int = 10
    vocabulary: int = 2048

    @torch.no_grad()
    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:  # noqa: ARG002
        """See `Attack.run`."""
        table: EmbeddingTable = auxiliary.take("embedding_table")
        corpus = [list(text) for text in auxiliary.take("corpus")]
        wanted = joined(masked_first_states(view))
        texts = [*wanted, *joined(masked_first_states(every_row(view)))]
        lengths = [len(text) for text in texts]
        kept = max(len(wanted), sum(1 for i in range(len(texts)) if sum(lengths[len(wanted) : i + 1]) <= self.rows))
        texts, lengths = texts[:kept], lengths[:kept]
        labels = _symbols(torch.cat(texts), _expected(corpus, sum(lengths), by_position=table.has_positions))
        positions = torch.cat([torch.arange(length) for length in lengths])
        # targets stand first and again in the whole: what they say about frequencies is counted once
        counted = slice(len(wanted), None) if len(texts) > len(wanted) else slice(None)
        cipher = _Script([part.tolist() for part in labels.split(lengths)][counted], by_position=False)
        place = dict(zip(labels.tolist(), positions.tolist(), strict=True)) if table.has_positions else None
        public = _Script(corpus, by_position=table.has_positions, most=self.vocabulary)
        found = _decipher(cipher, public, place, self.rounds)
        return Reconstruction(
            tokens=[
                [found.get(symbol, corpus[0][0]) for symbol in part.tolist()]
                for part in labels.split(lengths)[: len(wanted)]
            ]
        )


def _expected(corpus: Sequence[Sequence[int]], count: int, *, by_position: bool) -> int:
    """Distinct tokens (by position) in so much public text."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for text in corpus:
        if total >= count:
            break
        seen.update((place if by_position else 0, token) for place, token in enumerate(text[: count - total]))
        total += len(text)
    return max(2, len(seen))


def _symbols(rows: Float[Tensor, "n d"], expected: int) -> Int[Tensor, " n"]:
    """A number for each state, the same for equal ones (or near ones, where hardly any are equal)."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    exact = rows.double()  # in float32 a distance by products is off by more than SAME
    norms = exact.norm(dim=-1)
    left: list[Tensor] = []
    right: list[Tensor] = []
    for start in range(0, len(rows), 512):
        near = torch.cdist(exact[start : start + 512], exact) < SAME * norms[start : start + 512, None].clamp_min(1e-12)
        pairs = torch.nonzero(near)
        left.append(pairs[:, 0] + start)
        right.append(pairs[:, 1])
    a, b = torch.cat(left).numpy(), torch.cat(right).numpy()
    graph = coo_matrix((torch.ones(len(a)).numpy(), (a, b)), shape=(len(rows), len(rows)))
    count, labels = connected_components(graph, directed=False)
    if count <= TOO_MANY * expected:
        return torch.from_numpy(labels).long()
    return _near(rows, expected)


def _near(rows: Float[Tensor, "n d"], groups: int) -> Int[Tensor, " n"]:
    """Groups of states that point the same way."""
    from sklearn.cluster import AgglomerativeClustering

    model: Any = AgglomerativeClustering(n_clusters=groups, linkage="average")
    return torch.from_numpy(model.fit_predict(normalize(rows - rows.mean(0), dim=-1).numpy())).long()


class _Script:
    """Texts as sequences of symbols, the most frequent ones numbered, with their counts and what stands beside them."""

    def __init__(self, texts: Sequence[Sequence[int]], *, by_position: bool, most: int | None = None) -> None:
        named: list[list[Hashable]] = [
            [(place, symbol) if by_position else symbol for place, symbol in enumerate(text)] for text in texts
        ]
        frequent = Counter(symbol for text in named for symbol in text).most_common(most)
        self.names: list[Any] = [symbol for symbol, _ in frequent]
        self.counts = torch.tensor([float(count) for _, count in frequent])
        number = {symbol: index for index, symbol in enumerate(self.names)}
        pairs = Counter(
            (number[a], number[b]) for text in named for a, b in itertools.pairwise(text) if a in number and b in number
        )
        size = (len(self.names), len(self.names))
        indices = torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2).T
        values = torch.tensor(list(pairs.values())).float()
        self.beside = torch.sparse_coo_tensor(indices, values, size, check_invariants=True).coalesce()

    def contexts(self, anchors: Int[Tensor, " k"]) -> Float[Tensor, "n c"]:
        """How often each symbol has each anchor to its right and to its left: roots of shares, of length 1."""
        chosen = torch.zeros((len(self.names), len(anchors)))
        chosen[anchors, torch.arange(len(anchors))] = 1.0
        sides = [self.beside @ chosen, self.beside.T @ chosen]
        return normalize(torch.cat(sides, dim=1).sqrt(), dim=-1)


def _decipher(cipher: _Script, public: _Script, place: dict[int, int] | None, rounds: int) -> dict[int, int]:
    """Tokens by symbol."""
    ours = (cipher.counts / cipher.counts.sum()).log()
    theirs = (public.counts / public.counts.sum()).log()
    alike = -(ours[:, None] - theirs).abs() * 0.25
    if place is not None:
        apart = torch.tensor([place[name] for name in cipher.names])[:, None] != torch.tensor(
            [name[0] for name in public.names]
        )
        alike = alike.masked_fill(apart, -1e3)
    order = _assigned(alike)
    for turn in range(rounds):
        count = min(len(order), len(public.names), 16 * 2**turn)
        decided = torch.nonzero(order[:count] >= 0).flatten()
        near = cipher.contexts(decided) @ public.contexts(order[decided]).T
        order = _assigned(alike + near)
    tokens = [name[1] if place is not None else name for name in public.names]
    return {cipher.names[i]: tokens[j] for i, j in enumerate(order.tolist()) if j >= 0}


def _assigned(alike: Float[Tensor, "n m"]) -> Int[Tensor, " n"]:
    """A token of its own for each symbol, or -1 where there are more symbols than tokens."""
    n, m = alike.shape
    if n <= m:
        return assigned(alike)
    found = torch.full((n,), -1)
    found[assigned(alike.T)] = torch.arange(m)
    return found
