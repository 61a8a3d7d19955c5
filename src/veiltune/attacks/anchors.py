"""Attacks on masked first states with some tokens known: Gram anchors, and known plaintext.

*Symbols.* S the true first states (n, d), Y = S·R what the host sees; A and B = A·R the rows of both whose tokens are known.

*Gram anchors.* An orthogonal R keeps inner products: Y·Bᵀ = S·Aᵀ. A token v whose state s has the same products with the anchors
and the same norm is the one. Tokens told beyond doubt become anchors in their turn.

*Known plaintext.* R̂ = A⁺·B is the key on the span of the known states, the whole key from d independent ones on; then
X̂ = Y·R̂⁺ are the states (their projection onto that span), and tokens are the nearest of the projected vocabulary. Needs no
orthogonality. Where blocks stand before the states (`veil` with ``enclave_layers``), whole texts are known instead, their states
come from the base weights, and vocabulary matching through those blocks reads the others.

*Reference.* arXiv 2602.11088 (static secrets); the algebra is that of any fixed linear map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune.attacks.base import Attack, Auxiliary, EmbeddingTable, FirstState, Knowledge, Reconstruction
from veiltune.attacks.nearest import by_position, nearest_tokens, vocabulary_states
from veiltune.attacks.passes import FIRST_STATES, blocks_before, joined, masked_first_states
from veiltune.attacks.veiled import cut_states, read_cut_states
from veiltune.attacks.view import View
from veiltune.errors import UserError
from veiltune.study_terms import Knows

MAX_ANCHORS = 64
SPAN = 1e-4
"""Singular values of known states below this share of the largest span nothing: they are rounding."""


@dataclass(frozen=True)
class _Evidence:
    """Masked rows of every sequence one below the other, their positions, and the known ones among them."""

    rows: Float[Tensor, "n d"]
    positions: Int[Tensor, " n"]
    lengths: list[int]
    known: Int[Tensor, " k"]
    known_tokens: Int[Tensor, " k"]
    form: FirstState

    def split(self, values: Tensor) -> list[Tensor]:
        return list(values.split(self.lengths))


def _gather(view: View, auxiliary: Auxiliary, table: EmbeddingTable) -> _Evidence:
    sequences = joined(masked_first_states(view))
    lengths = [len(each) for each in sequences]
    pairs = auxiliary.take("known_pairs")
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    outside = next((pair for pair in pairs if pair[0] >= len(lengths) or pair[1] >= lengths[pair[0]]), None)
    if outside is not None or not pairs:
        raise UserError(
            f"known pair {outside} is in none of the {len(lengths)} sequences", hint="give pairs of this view"
        )
    rows = torch.cat(sequences)
    positions = torch.cat([torch.arange(length) for length in lengths])
    known = torch.tensor([starts[sequence] + position for sequence, position, _ in pairs])
    form = table.form(view.rights.design)
    return _Evidence(rows, positions, lengths, known, torch.tensor([token for *_, token in pairs]), form)


@dataclass(frozen=True)
class GramAnchors(Attack):
    """See the module. ``anchors`` tokens are known; ``rounds`` times the surest finds become anchors too."""

    name: ClassVar[str] = "gram_anchors"
    summary: ClassVar[str] = "inner products with a few known tokens, which a rotation keeps"
    observer: ClassVar[str] = "host"
    against: ClassVar = FIRST_STATES
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"embedding_table", "known_pairs"})
    knows: ClassVar[Knows] = "known_plaintext"
    cost: ClassVar[str] = "one product of the vocabulary with the anchors a round; seconds"
    single_tokens: ClassVar[bool] = True

    anchors: int = 8
    rounds: int = 2

    @torch.no_grad()
    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:  # noqa: ARG002
        """See `Attack.run`."""
        table: EmbeddingTable = auxiliary.take("embedding_table")
        seen = _gather(view, auxiliary, table)
        known, tokens = seen.known, seen.known_tokens
        guess = torch.zeros(len(seen.rows), dtype=torch.int64)
        for turn in range(self.rounds):
            truths = table.states(tokens, seen.positions[known], seen.form)
            guess, doubt = self._match(seen, table, seen.rows[known], truths)
            guess[known] = tokens
            if turn + 1 < self.rounds:
                known, tokens = self._surest(seen, guess, doubt)
        return Reconstruction(tokens=[part.tolist() for part in seen.split(guess)])

    def _match(
        self, seen: _Evidence, table: EmbeddingTable, masked: Tensor, truths: Tensor
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """The token of each row, and how little it stands out: its distance over the second best one's."""
        guess = torch.zeros(len(seen.rows), dtype=torch.int64)
        doubt = torch.ones(len(seen.rows))
        for position, rows in by_position(seen.positions, same=not table.has_positions):
            states = vocabulary_states(table, position, seen.form)
            wanted = _profile(states, truths)
            centre = wanted.mean(0)
            scale = (wanted - centre).std(0).clamp_min(1e-12)
            have = _profile(seen.rows[rows], masked)
            for part, mine in zip(rows.split(256), have.split(256), strict=True):
                distances = torch.cdist((mine - centre) / scale, (wanted - centre) / scale)
                best = distances.topk(min(2, table.vocab_size), largest=False)
                guess[part] = best.indices[:, 0]
                doubt[part] = best.values[:, 0] / best.values[:, -1].clamp_min(1e-12)
        return guess, doubt

    @staticmethod
    def _surest(seen: _Evidence, guess: Tensor, doubt: Tensor) -> tuple[Tensor, Tensor]:
        """The known rows, and of each token found the row that left least doubt, up to `MAX_ANCHORS` in all."""
        doubt = doubt.clone()
        doubt[seen.known] = -1.0
        order = doubt.argsort()
        chosen: dict[int, int] = {}
        for row in order.tolist():
            if len(chosen) == MAX_ANCHORS:
                break
            chosen.setdefault(int(guess[row]), row)
        known = torch.tensor(sorted({*chosen.values(), *seen.known.tolist()}))
        return known, guess[known]


def _profile(states: Float[Tensor, "n d"], anchors: Float[Tensor, "k d"]) -> Float[Tensor, "n f"]:
    """What a rotation keeps of states: inner products with the anchors, and the norm."""
    return torch.cat([states @ anchors.T, states.norm(dim=-1, keepdim=True)], dim=1)


@dataclass(frozen=True)
class KnownPlaintext(Attack):
    """See the module. ``pairs`` distinct states are known."""

    name: ClassVar[str] = "known_plaintext"
    summary: ClassVar[str] = "the key from pairs of a state and its masked form"
    observer: ClassVar[str] = "host"
    against: ClassVar = FIRST_STATES
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"embedding_table", "known_pairs", "base_weights"})
    knows: ClassVar[Knows] = "known_plaintext"
    cost: ClassVar[str] = "a least-squares problem of (pairs, d) and a product with the vocabulary; seconds"

    pairs: int = 64

    def takes(self, design: str, layers: int) -> frozenset[Knowledge]:  # noqa: ARG002
        """See `Attack.takes`: weights of blocks only where some are run before the host's states."""
        return self.auxiliary if layers else self.auxiliary - {"base_weights"}

    @torch.no_grad()
    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """See `Attack.run`."""
        table: EmbeddingTable = auxiliary.take("embedding_table")
        seen = _gather(view, auxiliary, table)
        layers = blocks_before(view)
        if layers:
            truths = _through_blocks(auxiliary, layers).double()
        else:
            truths = table.states(seen.known_tokens, seen.positions[seen.known], seen.form).double()
        inverse = torch.linalg.pinv(truths, rtol=SPAN)
        key = inverse @ seen.rows[seen.known].double()
        states = (seen.rows.double() @ torch.linalg.pinv(key, rtol=SPAN)).float()
        projection = (inverse @ truths).float()
        if layers:
            sequences = seen.split(states)
            found = read_cut_states(auxiliary.take("base_weights"), layers, sequences, rng, projection)
            return Reconstruction(tokens=found, states=sequences)
        tokens = nearest_tokens(states, seen.positions, table, seen.form, projection)
        return Reconstruction(tokens=[part.tolist() for part in seen.split(tokens)], states=seen.split(states))


def _through_blocks(auxiliary: Auxiliary, layers: int) -> Float[Tensor, "k d"]:
    """True states of the known tokens, in the order of the pairs. Of a text they are known from its beginning on."""
    texts: dict[int, list[int]] = {}
    for sequence, position, token in auxiliary.take("known_pairs"):
        if position != len(texts.setdefault(sequence, [])):
            raise UserError(
                f"of text {sequence} token {position} is known, and not all before it",
                hint="states after a block need whole beginnings of texts",
            )
        texts[sequence].append(token)
    return torch.cat([cut_states(auxiliary.take("base_weights"), layers, text) for text in texts.values()])
