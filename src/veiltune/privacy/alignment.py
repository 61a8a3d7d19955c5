"""Orthogonal Procrustes: how far one set of weights is another in a rotated basis, and what chance alone would give.

*Symbols.* W (d, n): weights, rows meeting the residual stream; W' an ancestor's; M = W'·Wᵀ = U·S·Vᵀ with nuclear norm ‖M‖⋆ = ΣS.
The orthogonal Q for which Q·W is nearest to W' is U·Vᵀ. Similarity s = ‖M‖⋆ / (‖W‖·‖W'‖) is the largest cosine over all Q, and
ρ = √(1 - s²) the relative residual. As s is the same for W and for R⁻¹·W, it says what whoever holds masked weights and W' gets,
without any key.

*Chance.* Unrelated weights have s above zero, for Q is chosen to fit: 8/(3π)·√(d/n) for Gaussian ones and n ≫ d (the mean
singular value of a square Gaussian matrix, by the quarter circle), 0.75 for n = d. So s is held against the same weights with the
signs of their columns drawn at random: norms of columns and all else stay, and what relates the two models goes. Excess
e = (s - chance) / (1 - chance): 0 by chance, 1 for the same weights up to a rotation.

*Reference.* Schönemann, "A generalized solution of the orthogonal Procrustes problem" (1966).

*Bound.* None. e measures this one relation; weights whose columns were put in another order are related and have e about 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

SAME_SPECTRUM = 0.75
"""Largest relative distance of two spectra that still tells a rotation: an ancestor at 50% is far nearer than that."""
ALIGNED_EXCESS = 0.3
"""From this excess on two sets of weights are taken for related: between what unrelated trained ones reach (up to 0.16) and an
ancestor at 100% (from 0.48), by `benchmarks.ancestry`."""
FULL_CHANCE = 0.9
"""Where chance alone gives this similarity (far fewer columns than rows), nothing can be told."""


def recover_key(ancestor: Float[Tensor, "d n"], masked: Float[Tensor, "d n"]) -> Float[Tensor, "d d"]:
    """The matrix K for which K·masked is nearest to the ancestor: R on the input side, R⁻ᵀ on the output side."""
    ours, theirs = torch.linalg.svdvals(ancestor), torch.linalg.svdvals(masked)
    if float((ours - theirs).norm() / ours.norm()) > SAME_SPECTRUM:
        return ancestor @ torch.linalg.pinv(masked)
    u, _, vh = torch.linalg.svd(ancestor @ masked.T)
    return u @ vh


@dataclass(frozen=True)
class Alignment:
    """How one key's weights lie to an ancestor's.

    Attributes:
        similarity: s.
        chance: mean similarity over random signs.
        weight_error: ‖Q·W - W‖ / ‖W‖, by how much the weights that an attacker recovers are off, where both models have the same
            basis; √2 is what a random rotation gives.
    """

    similarity: float
    chance: float
    weight_error: float

    @property
    def residual(self) -> float:
        """ρ, from 0 to 1."""
        return math.sqrt(max(0.0, 1 - self.similarity**2))

    @property
    def is_telling(self) -> bool:
        """Whether weights of this shape can be told from unrelated ones at all."""
        return self.chance < FULL_CHANCE

    @property
    def excess(self) -> float:
        """e; 0 where nothing can be told."""
        return (self.similarity - self.chance) / (1 - self.chance) if self.is_telling else 0.0

    @property
    def is_aligned(self) -> bool:
        """Whether it is more than chance gives."""
        return self.excess >= ALIGNED_EXCESS


def similarity(cross: Float64[Tensor, "d d"], norms: float) -> float:
    """From M and the product of both Frobenius norms; 0 for weights that are zero."""
    return float(torch.linalg.svdvals(cross).sum()) / norms if norms else 0.0


def align(
    ancestor: Float[Tensor, "d n"], weights: Float[Tensor, "d n"], rng: torch.Generator, *, draws: int = 2
) -> Alignment:
    """Measure one key's weights against an ancestor's, in float64.

    Args:
        ancestor: W'.
        weights: W; the linears that share the key, side by side.
        rng: of the signs.
        draws: how many times they are drawn.
    """
    ours, theirs = weights.double(), ancestor.double()
    norms = float(ours.norm() * theirs.norm())
    u, s, vh = torch.linalg.svd(theirs @ ours.T)
    by_chance = [
        similarity((theirs * (2 * torch.randint(0, 2, (theirs.shape[1],), generator=rng) - 1)) @ ours.T, norms)
        for _ in range(draws)
    ]
    error = float((u @ (vh @ ours) - ours).norm() / ours.norm()) if norms else 0.0
    return Alignment(float(s.sum()) / norms if norms else 0.0, sum(by_chance) / draws, error)
