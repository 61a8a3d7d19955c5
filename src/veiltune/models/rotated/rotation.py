"""The residual stream in a rotated basis, x* = x·M·R, and the linears at its border: those that read it and those that write it.

*Reference.* Computational invariance: SliceGPT (arXiv 2401.15024), QuaRot (arXiv 2404.00456), which rotate for compression. The
constant channel (below), which lets LoRA read a folded LayerNorm exactly, is ours.

*Symbols.* Rows; R orthogonal (a `Key`); M = I - 1ᵀ1/d for LayerNorm families and I otherwise; g and β a norm's gain and bias.

- RMSNorm(x·R) = RMSNorm(x)·R, and LayerNorm without gain is RMSNorm of x·M. So the host normalises x* to n* = n·R.
- A linear that reads the norm meets n·diag(g) + β. The bias cannot go into the linear's own bias once LoRA is there: β·A·B would
  move with the factors. As n·1ᵀ = 0, the direction of 1 is free, and the host adds the constant 1·R to n*: with
  T = M·diag(g) + 1ᵀβ/d then (n + 1)·T = n·diag(g) + β. Readers: W* = R⁻¹·T·W and A* = R⁻¹·T·A; biases stay.
- Writers: W* = W·M·R, b* = b·M·R, B* = B·M·R. What B has along 1 moves only the mean, which every norm takes out: it has no
  effect and no gradient.

*Reveals.* Norms and inner products of (centred) states. In LayerNorm families also the image of 1, which no state has a part in.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from veiltune.models.rotated.maps import LinearMap, Rows
from veiltune.privacy.orthogonal import Key
from veiltune.secrets import Secret

_POWER_STEPS = 60


def centred(rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """rows·M."""
    return rows - rows.mean(-1, keepdim=True)


@final
class Stream(Secret):
    """The border between the plain stream and the host's.

    Args:
        key: R.
        is_centred: the model has LayerNorms.
    """

    def __init__(self, key: Key, *, is_centred: bool) -> None:
        self.key = key
        self.is_centred = is_centred

    def enter(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """x·M·R; differentiable, so its gradient is dx = dx*·Rᵀ·M."""
        return self.key.mask(centred(x) if self.is_centred else x)

    def leave(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """x*·R⁻¹: the plain state, in LayerNorm families without its mean; differentiable."""
        return self.key.unmask(x)

    def constant(self) -> Float64[Tensor, " d"]:
        """1·R."""
        return self.key.mask(torch.ones(1, self.key.dim, dtype=torch.float64))[0]

    def sandwich(self, gain: Float64[Tensor, " d"]) -> Float64[Tensor, "d d"]:
        """R⁻¹·diag(g)·R: the gain of a norm on a branch's output, in the rotated basis.

        *Reveals.* Its eigenvectors are the rows of R, up to sign, order, and rotations among channels of equal gain.
        """
        return self.key.mask(self.key.mask_gradient(torch.diag(gain)).T)


class BorderMap(LinearMap):
    """A map that ends in the stream's key: a cheap part, and a product with R that many maps can share."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    @abstractmethod
    def fold(self, rows: Rows) -> Rows:
        """The part before the key, on the way in."""

    @abstractmethod
    def unfold(self, rows: Rows) -> Rows:
        """The inverse of `fold`."""

    @abstractmethod
    def fold_back(self, rows: Rows) -> Rows:
        """The transpose of `fold`."""

    @abstractmethod
    def turn(self, rows: Rows) -> Rows:
        """The key's part of `apply`."""

    @abstractmethod
    def turn_undone(self, rows: Rows) -> Rows:
        """The key's part of `undo`."""

    @abstractmethod
    def turn_back(self, rows: Rows) -> Rows:
        """The key's part of `pull_back`."""

    def apply(self, rows: Rows) -> Rows:
        """See `LinearMap.apply`."""
        return self.turn(self.fold(rows))

    def undo(self, rows: Rows) -> Rows:
        """See `LinearMap.undo`."""
        return self.unfold(self.turn_undone(rows))

    def pull_back(self, rows: Rows) -> Rows:
        """See `LinearMap.pull_back`."""
        return self.fold_back(self.turn_back(rows))


@final
class Reads(BorderMap):
    """The input side of a linear behind a norm: S = (R⁻¹·T)ᵀ = Tᵀ·R⁻ᵀ.

    Args:
        stream: the rotated stream.
        gain: g.
        bias: β, or ``None`` where it is absent or zero: no constant is added then, and T = M·diag(g).
    """

    def __init__(self, stream: Stream, gain: Float64[Tensor, " d"], bias: Float64[Tensor, " d"] | None) -> None:
        super().__init__(stream)
        self._gain = gain
        self._bias = bias

    def fold(self, rows: Rows) -> Rows:
        """rows·Tᵀ."""
        scaled = rows * self._gain.to(rows)
        if self.stream.is_centred:
            scaled = centred(scaled)
        return scaled if self._bias is None else scaled + (rows @ self._bias.to(rows) / rows.shape[-1])[:, None]

    def unfold(self, rows: Rows) -> Rows:
        """rows·T⁻ᵀ; where T has a kernel (no bias), the solution whose scaled rows have no mean, which serves as well."""
        gain = self._gain.to(rows)
        if not self.stream.is_centred:
            return rows / gain
        mean, rest = rows.mean(-1, keepdim=True), centred(rows)
        if self._bias is None:
            return rest / gain
        ratio = self._bias.to(rows) / gain
        return (rest + (rows.shape[-1] * mean - (rest @ ratio)[:, None]) / ratio.sum()) / gain

    def fold_back(self, rows: Rows) -> Rows:
        """rows·T."""
        if not self.stream.is_centred:
            return rows * self._gain.to(rows)
        scaled = centred(rows) * self._gain.to(rows)
        return scaled if self._bias is None else scaled + rows.mean(-1, keepdim=True) * self._bias.to(rows)

    def turn(self, rows: Rows) -> Rows:
        """rows·R⁻ᵀ."""
        return self.stream.key.mask_gradient(rows)

    def turn_undone(self, rows: Rows) -> Rows:
        """rows·Rᵀ."""
        return self.stream.key.unmask_gradient(rows)

    def turn_back(self, rows: Rows) -> Rows:
        """rows·R⁻¹."""
        return self.stream.key.unmask(rows)

    def _unfold_back(self, rows: Rows) -> Rows:
        """rows·T⁻¹, where there is a bias: what `unfold` is the transpose of."""
        gain, bias = self._gain.to(rows), self._bias.to(rows)  # pyrefly: ignore[missing-attribute]
        mean = (rows / gain).sum(-1, keepdim=True) / (bias / gain).sum()
        return (rows - mean * bias) / gain + mean

    def condition_number(self) -> float:
        """κ(T), by power iteration, from slightly below; ∞ if T cannot be undone. How much `unfold` can enlarge an error."""
        smallest = float(self._gain.abs().min())
        if smallest == 0 or (
            self._bias is None and self.stream.is_centred
        ):  # the constant channel would be trained too
            return float("inf")
        if self._bias is None:
            return float(self._gain.abs().max()) / smallest
        if float((self._bias / self._gain).sum()) == 0:
            return float("inf")
        start = torch.randn(1, len(self._gain), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        norms = []
        for there, back in ((self.fold, self.fold_back), (self.unfold, self._unfold_back)):
            vector = start
            for _ in range(_POWER_STEPS):
                vector = back(there(vector))
                vector = vector / vector.norm()
            norms.append(float(there(vector).norm()))
        return norms[0] * norms[1]

    def error_growth(self) -> float:
        """How much a rounding error of `undo`'s result is enlarged in what a linear computes with it; ∞: nothing to undo.

        At most κ(T). Where T is diagonal, 1: the entries that a small gain made large are met by that gain again, and a
        float's error is relative to its entry.
        """
        if self.stream.is_centred:
            return self.condition_number()
        return 1.0 if bool(self._gain.all()) else float("inf")


@final
class Writes(BorderMap):
    """The output side of a linear that writes to the stream: S = M·R."""

    def fold(self, rows: Rows) -> Rows:
        """rows·M."""
        return centred(rows) if self.stream.is_centred else rows

    def unfold(self, rows: Rows) -> Rows:
        """Nothing can restore a mean; 0 serves as well."""
        return self.fold(rows)

    def fold_back(self, rows: Rows) -> Rows:
        """rows·M."""
        return self.fold(rows)

    def turn(self, rows: Rows) -> Rows:
        """rows·R."""
        return self.stream.key.mask(rows)

    def turn_undone(self, rows: Rows) -> Rows:
        """rows·R⁻¹."""
        return self.stream.key.unmask(rows)

    def turn_back(self, rows: Rows) -> Rows:
        """rows·Rᵀ."""
        return self.stream.key.unmask_gradient(rows)
