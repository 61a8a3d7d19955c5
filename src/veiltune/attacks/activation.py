"""Activation inversion: inputs are optimised until what the public bottom makes of them is what crossed.

*Reference.* EIA (embedding inversion by optimisation, Song and Raghunathan, arXiv 2004.00053) and the forward half of BiSR (arXiv
2409.00960). Each position holds a mixture over a shortlist of tokens; the mixture's mean embedding goes through the bottom, and
all positions of a text are optimised together, so that no early mistake spoils what follows.

*Aware of.* Rounding, straight through; noise, for distances are those of `attacks.adapting`, likelihoods once the noise was
estimated; a bottom that was tuned since, or squeezed, by ``rounds`` of guessing and correcting. Each round begins at what the
last one found: once guesses have corrected the bottom, distances are of the noise's size, and far from the truth lead nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune.attacks.adapting import Channel
from veiltune.attacks.base import Attack, Auxiliary, Knowledge, Reconstruction, provider_reads, setting
from veiltune.attacks.passes import agreement_of, joined, places_in, require_whole, smashed_states
from veiltune.attacks.shortlist import Shortlist
from veiltune.attacks.view import View
from veiltune.models.bottom import Bottom
from veiltune.study_terms import Knows

SEQUENCES = 8  # optimised at a time
RATE = 0.2
SHARPNESS = 10.0
"""What cosines are multiplied by, to be logits."""
SURE = 3.0
"""How far above the best of the rest a token begins that is known, or was found a round before, in logits."""
DECISION = 0.1
"""Weight of the mixtures' entropy at the end, over the distance at the start; it grows from 0."""


@dataclass(frozen=True)
class Guess:
    """Tokens that may stand at each position of a text, and how likely each is at first."""

    tokens: Int[Tensor, "seq n"]
    logits: Float[Tensor, "seq n"]


@dataclass(frozen=True)
class ActivationInversion(Attack):
    """See the module. ``steps`` of the optimiser over ``shortlist`` tokens a position; ``rounds`` corrections between them."""

    name: ClassVar[str] = "activation_inversion"
    summary: ClassVar[str] = "inputs optimised until their states are what crossed (EIA), guesses correcting the bottom"
    observer: ClassVar[str] = "provider"
    against: ClassVar = provider_reads()
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"base_weights"})
    knows: ClassVar[Knows] = "nothing"
    cost: ClassVar[str] = "(rounds + 1) x steps passes back and forth through the bottom; minutes for sixteen sequences"

    shortlist: int = 24
    steps: int = 60
    rounds: int = setting(1, least=0)

    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """See `Attack.run`."""
        agreed = agreement_of(view)
        channel = Channel(Bottom(auxiliary.take("base_weights"), agreed.bottom_layers), agreed)
        passes = smashed_states(view)
        require_whole(places_in(passes), self.name)
        sequences = joined(passes)
        tokens: list[list[int]] = []
        for number in range(self.rounds + 1):
            if number:
                channel.adapt(sequences, tokens)
            guesses = by_linear_map(channel, sequences, self.shortlist, rng)
            if number:
                guesses = [surer(*each) for each in zip(guesses, tokens, strict=True)]
            tokens = matched(channel, sequences, guesses, self.steps)
        return Reconstruction(tokens=tokens)


def surer(guess: Guess, known: Sequence[int]) -> Guess:
    """The same where nothing is known (-100); else what is known, in the place of the last if it is new, likelier than all."""
    tokens, logits, found = guess.tokens.clone(), guess.logits.clone(), torch.tensor(list(known))
    rows = torch.nonzero(found >= 0)[:, 0]
    already = tokens[rows] == found[rows, None]
    place = torch.where(already.any(1), already.int().argmax(1), tokens.shape[1] - 1)
    tokens[rows, place] = found[rows]
    logits[rows, place] = guess.logits[rows].amax(1) + SURE
    return Guess(tokens, logits)


@torch.no_grad()
def by_linear_map(
    channel: Channel, sequences: Sequence[Float[Tensor, "_ k"]], count: int, rng: torch.Generator
) -> list[Guess]:
    """First guesses of a `Shortlist`."""
    count = min(count, channel.bottom.vocab_size)
    linear = Shortlist(channel, rng)
    found: list[Guess] = []
    for seen in sequences:
        tokens = torch.cat([linear.tokens(row[None], position, count) for position, row in enumerate(seen)])
        scores = torch.cat([linear.scores(row[None], position) for position, row in enumerate(seen)])
        logits = SHARPNESS * scores.gather(1, tokens)
        if channel.bottom.layers:
            logits[0] = 0.0  # the linear map says nothing of the first position
        found.append(Guess(tokens, logits))
    return found


def matched(
    channel: Channel, sequences: Sequence[Float[Tensor, "_ k"]], guesses: Sequence[Guess], steps: int
) -> list[list[int]]:
    """The tokens of each sequence after optimisation, a few sequences of like length at a time."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    found: list[list[int]] = [[] for _ in sequences]
    for start in range(0, len(order), SEQUENCES):
        chosen = order[start : start + SEQUENCES]
        some = _optimised(channel, [sequences[i] for i in chosen], [guesses[i] for i in chosen], steps)
        for index, tokens in zip(chosen, some, strict=True):
            found[index] = tokens
    return found


def _optimised(channel: Channel, sequences: Sequence[Tensor], guesses: Sequence[Guess], steps: int) -> list[list[int]]:
    pad = torch.nn.utils.rnn.pad_sequence
    seen = pad(list(sequences), batch_first=True)
    tokens = pad([guess.tokens for guess in guesses], batch_first=True)
    logits = pad([guess.logits for guess in guesses], batch_first=True).clone().requires_grad_()
    lengths = torch.tensor([len(each) for each in sequences])
    present = torch.arange(seen.shape[1]) < lengths[:, None]
    with torch.no_grad():
        embeddings = channel.bottom.model.get_input_embeddings()(tokens)
    optimizer = torch.optim.Adam([logits], lr=RATE)
    unit: Tensor | None = None
    with torch.enable_grad():
        for step in range(steps):
            weights = logits.softmax(-1)
            mean = (weights[..., None] * embeddings).sum(2)
            made = channel.straight_through(channel.bottom.from_embeddings(mean))
            distances = channel.distances(made, seen)[present]
            unit = distances.detach().mean().clamp_min(1e-30) if unit is None else unit
            entropy = torch.distributions.Categorical(logits=logits[present]).entropy().mean()
            loss = distances.mean() / unit + DECISION * step / steps * entropy
            optimizer.zero_grad()
            loss.backward(inputs=[logits])
            optimizer.step()
    best = tokens.gather(2, logits.detach().argmax(-1, keepdim=True))[..., 0]
    return [row[:length].tolist() for row, length in zip(best, lengths.tolist(), strict=True)]
