"""What an attacker at the cut learns of a bottom that it does not have, from its own guesses: guess, correct, guess again.

The owner's bottom was tuned (decorrelated, squeezed through a bottleneck, disturbed by noise) since the provider last saw it. Yet
most of what that did to the states is one affine map, the same for all tokens, and some noise. Given tokens that are mostly
right, both can be estimated.

*Symbols.* z what crossed, ẑ(t) what the public bottom makes of the guessed text t, as it would have crossed. A correction is
C(ẑ) = ẑ + (ẑ - c)·M + b, by ridge regression of z - ẑ over positions that are explained well, where the ridge draws M to zero;
Σ is the covariance of z - C(ẑ), shrunk towards its diagonal's mean. Distances are those of L·(z - C(ẑ)) with L = Σ^(-1/2): minus
twice the log-likelihood of Gaussian noise, so a language model's log-probabilities can be added to them.

*Reference.* Expectation-maximisation with hard assignments (Celeux and Govaert 1992), of the affine model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune.attacks.passes import Agreement
from veiltune.models.bottom import Bottom

TRUSTED = 0.8
"""Share of the positions, the best explained ones, that a correction is fitted to."""
RIDGES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
"""Of the mean eigenvalue; the one that explains held-out positions best is taken."""
HELD_OUT = 5
SHRINKAGE = 0.1
ROWS = 64  # sequences through the bottom at a time


@dataclass(frozen=True)
class Correction:
    """What crossed, as a function of what the public bottom makes of the same tokens; see the module."""

    centre: Float[Tensor, " k"] = field(repr=False)
    linear: Float[Tensor, "k k"] = field(repr=False)
    offset: Float[Tensor, " k"] = field(repr=False)
    first: Float[Tensor, " k"] = field(repr=False)
    covariance: Float[Tensor, "k k"] = field(repr=False)
    whitening: Float[Tensor, "k k"] = field(repr=False)

    def apply(self, crossing: Float[Tensor, "n seq k"], *, starts: bool) -> Float[Tensor, "n seq k"]:
        """Corrected states; a sequence's first position, an outlier, has an offset of its own. Differentiable."""
        moved = crossing + (crossing - self.centre) @ self.linear + self.offset
        return torch.cat([crossing[:, :1] + self.first, moved[:, 1:]], dim=1) if starts else moved

    def whitened(self, difference: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        """Differences of states in units of the noise."""
        return difference @ self.whitening


class Channel:
    """From tokens to what crosses, as far as the attacker knows: the public bottom, a correction, the wire.

    Args:
        bottom: of the model before tuning.
        agreed: the wire.
    """

    def __init__(self, bottom: Bottom, agreed: Agreement) -> None:
        self.bottom = bottom
        self.agreed = agreed
        self.correction: Correction | None = None

    def seen(self, states: Float[Tensor, "n seq d"], *, starts: bool) -> Float[Tensor, "n seq k"]:
        """What crosses of the public bottom's states."""
        return self.agreed.quantised(self.expected(states, starts=starts), starts=starts)

    def expected(self, states: Float[Tensor, "n seq d"], *, starts: bool) -> Float[Tensor, "n seq k"]:
        """The same before it is rounded; differentiable."""
        crossing = self.agreed.projected(states)
        return crossing if self.correction is None else self.correction.apply(crossing, starts=starts)

    def straight_through(self, states: Float[Tensor, "n seq d"]) -> Float[Tensor, "n seq k"]:
        """What crosses of whole sequences, with the gradient of what is not rounded."""
        exact = self.expected(states, starts=True)
        return exact + (self.agreed.quantised(exact.detach(), starts=True) - exact.detach())

    def distances(self, found: Float[Tensor, "*#batch k"], seen: Float[Tensor, "*#batch k"]) -> Float[Tensor, "*batch"]:
        """Squares in units of the noise; until that is known, relative to the square of what was seen."""
        if self.correction is None:
            return (found - seen).square().sum(-1) / seen.square().sum(-1).clamp_min(1e-30)
        return self.correction.whitened(found - seen).square().sum(-1)

    @torch.no_grad()
    def adapt(
        self,
        sequences: Sequence[Float[Tensor, "_ k"]],
        tokens: Sequence[Sequence[int]],
        places: Sequence[Int[Tensor, " _"]] | None = None,
    ) -> None:
        """Estimate the correction from what crossed and a guess of the tokens behind it.

        Args:
            sequences: states of each text.
            tokens: a guess for each state.
            places: where in their texts these stand, where some are missing; ``None``: they count.
        """
        guesses = [torch.tensor(list(each)) for each in tokens]
        made: list[Tensor] = []
        for start in range(0, len(guesses), ROWS):
            part = guesses[start : start + ROWS]
            ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            stand: dict[str, Tensor] = {}
            if places is not None:  # with a mask, lest gaps be taken for the borders of packed texts
                stand["position_ids"] = torch.nn.utils.rnn.pad_sequence(
                    [*places[start : start + ROWS]], batch_first=True
                )
                stand["attention_mask"] = torch.nn.utils.rnn.pad_sequence(
                    [*map(torch.ones_like, part)], batch_first=True
                )
            crossing = self.agreed.projected(self.bottom.states(ids, **stand))
            made += [row[: len(each)] for row, each in zip(crossing, part, strict=True)]
        firsts = torch.stack([seen[0] - guess[0] for seen, guess in zip(sequences, made, strict=True)])
        x, z = torch.cat([each[1:] for each in made]), torch.cat([each[1:] for each in sequences])
        if len(x) > 2 * HELD_OUT:
            self.correction = fit_correction(x, z, firsts.mean(0))


def fit_correction(x: Float[Tensor, "n k"], z: Float[Tensor, "n k"], first: Float[Tensor, " k"]) -> Correction:
    """The correction from x to z, twice: of all rows, then of those that the first one explains best.

    Args:
        x: what the public bottom makes of guessed tokens.
        z: what crossed there.
        first: offset of first positions.
    """
    kept = torch.arange(len(x))
    for _ in range(2):
        correction = _affine(x[kept], z[kept], first)
        residual = z - correction.apply(x[None], starts=False)[0]
        cost = correction.whitened(residual).square().sum(1)
        kept = cost.argsort()[: max(2 * HELD_OUT, int(TRUSTED * len(x)))].sort().values
    return correction


def _affine(x: Tensor, z: Tensor, first: Tensor) -> Correction:
    held = torch.arange(len(x)) % HELD_OUT == 0
    errors = [_held_out(x, z, held, ridge) for ridge in RIDGES]
    best = min(range(len(RIDGES)), key=lambda i: float(errors[i].square().sum()))
    centre, linear, offset = _ridge(x, z, RIDGES[best])
    residual = errors[best].double()  # of rows it was not fitted to: else the noise looks smaller than it is
    covariance = residual.T @ residual / len(residual)
    level = covariance.diagonal().mean().clamp_min(1e-12 * float(z.square().mean()) + 1e-30)
    covariance.mul_(1 - SHRINKAGE).diagonal().add_(SHRINKAGE * level)
    values, vectors = torch.linalg.eigh(covariance)
    whitening = vectors * values.clamp_min(1e-3 * float(level)).rsqrt() @ vectors.T
    return Correction(centre, linear, offset, first, covariance.float(), whitening.float())


def _held_out(x: Tensor, z: Tensor, held: Tensor, ridge: float) -> Tensor:
    centre, linear, offset = _ridge(x[~held], z[~held], ridge)
    rows = x[held]
    return z[held] - rows - (rows - centre) @ linear - offset


def _ridge(x: Tensor, z: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    centre, offset = x.mean(0), (z - x).mean(0)
    rows, wanted = (x - centre).double(), (z - x - offset).double()
    return centre, torch.linalg.solve(ridged(rows.T @ rows, ridge), rows.T @ wanted).float(), offset


def ridged(gram: Float[Tensor, "k k"], share: float) -> Float[Tensor, "k k"]:
    """A Gram matrix with that share of its mean diagonal added to the diagonal, in place: ridge regression's left side."""
    gram.diagonal().add_(share * float(gram.diagonal().mean()) + 1e-30)
    return gram
