"""BiSR: both directions at the cut put together.

*Reference.* arXiv 2409.00960: a learned inverter reads the states (SIP), gradient matching at the top reads the labels, and both
start an optimisation against the states at the bottom. Each part is an attack of its own here (`attacks.inverter`,
`attacks.cut_gradients`, `attacks.activation`), defence-aware as that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from veiltune.attacks.activation import Guess, matched, surer
from veiltune.attacks.adapting import Channel
from veiltune.attacks.base import Auxiliary, Reconstruction, setting
from veiltune.attacks.cut_gradients import GradientLabels, labels_of
from veiltune.attacks.inverter import LearnedInverter
from veiltune.attacks.passes import agreement_of, joined, smashed_states
from veiltune.attacks.view import View
from veiltune.models.bottom import Bottom


@dataclass(frozen=True)
class Bisr(LearnedInverter):
    """See the module. The inverter's settings; ``iterations`` of the label solver; ``steps`` and ``rounds`` of the matching."""

    name: ClassVar[str] = "bisr"
    summary: ClassVar[str] = "learned inverter, labels from gradients, then states matched by optimisation (BiSR)"
    against: ClassVar = GradientLabels.against
    phases: ClassVar = GradientLabels.phases
    cost: ClassVar[str] = "that of the learned inverter, of the labels and of the activation inversion together"

    shortlist: int = 24
    steps: int = 60
    rounds: int = setting(1, least=0)
    iterations: int = 24

    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """See `Attack.run`."""
        agreed, model = agreement_of(view), auxiliary.take("base_weights")
        labels = labels_of(view, model, self.iterations, rng)
        scores = self.scores(view, auxiliary, rng)
        count = min(self.shortlist, scores[0].shape[1])
        guesses = [_guess(each, known, count) for each, known in zip(scores, labels, strict=True)]
        sequences = joined(smashed_states(view))
        channel = Channel(Bottom(model, agreed.bottom_layers), agreed)
        tokens = [guess.tokens.gather(1, guess.logits.argmax(1, keepdim=True))[:, 0].tolist() for guess in guesses]
        # The inverter's own guess is the first: it knows the tuning that it was trained through.
        for _ in range(self.rounds):
            channel.adapt(sequences, tokens)
            tokens = matched(channel, sequences, guesses, self.steps)
        return Reconstruction(tokens=tokens, labels=labels)


def _guess(scores: Float[Tensor, "seq v"], labels: list[int], count: int) -> Guess:
    """The inverter's best tokens; where a label is known, that in the place of the last of them, and likelier than all."""
    best = scores.log_softmax(-1).topk(count, dim=-1)
    return surer(Guess(best.indices, best.values), labels)
