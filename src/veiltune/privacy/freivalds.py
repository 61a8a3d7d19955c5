"""Checking a product without computing it again: Freivalds' check with a secret real vector, prepared while a weight passes by.

Whoever wants to check Y = X·W without keeping W draws a secret r and keeps W·r. Then Y·r = X·(W·r) must hold row by row, at the
cost of two products with a vector.

*Reference.* Freivalds, "Probabilistic machines can use less running time" (IFIP 1977); prepared images of fixed weights: Slalom
(Tramèr and Boneh, ICLR 2019, §3.2), there modulo a prime. Over the reals a tolerance takes the place of equality.

*Symbols.* r: `VECTORS` columns of independent N(0, 1). W may carry a LoRA pair: X·(W + s·AᵀBᵀ), PEFT's orientation, whose images
are made from the factors. u: half of eps. ε: the change in one row of Y.

*Bound.* *Missed*: ε·r is N(0, ‖ε‖²) to whoever does not know r, so a row changed by ε passes the tolerance τ with probability at
most (√(2/π)·τ/‖ε‖)^VECTORS. *False alarm*: entry j of an honest row errs by a sum of up to n = in independent roundings, each at
most u·‖x‖·‖w_j‖, so it is sub-Gaussian with parameter √n·u·‖x‖·‖w_j‖ (Higham and Mary, SIAM J. Sci. Comput. 41 (2019)), and
Σ_j r_j·error_j with √n·u·‖x‖·√(Σ_j r_j²·‖w_j‖²). τ is `LAMBDA` times that: exceeded with probability below 2·exp(-LAMBDA²/2) =
4e-22 a row and vector. For a typical row τ is about 10·u·n·‖y‖: 5e-4 of ‖y‖ at n = 768 in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from veiltune.secrets import Secret

VECTORS: Final = 2
LAMBDA: Final = 10.0
_SUMS: Final = 2
"""Roundings of an entry beside those of its inner product: the LoRA branch and the bias are added."""
_OWN: Final = torch.finfo(torch.float64).eps / 2
"""One rounding of the check itself, which counts where the product is in float64 too."""


@dataclass(frozen=True, repr=False)
class Lora:
    """One pair as it acts on a product's input: X·(s·AᵀBᵀ), A (rank, in), B (out, rank)."""

    down: Float[Tensor, "rank in"]
    up: Float[Tensor, "out rank"]
    scaling: float

    def turned(self) -> Lora:
        """The pair of the transposed product."""
        return Lora(self.up.T, self.down.T, self.scaling)


@final
class Image(Secret):
    """What is kept of X·W + b: r, W·r, b·r, and what the rounding errors of W's columns amount to. Float64 on the CPU.

    Args:
        weight: W, (in, out); not kept.
        vectors: r, (out, `VECTORS`).
        bias: b, (out,).
    """

    def __init__(
        self,
        weight: Float[Tensor, "in out"],
        vectors: Float64[Tensor, "out k"],
        bias: Float[Tensor, " out"] | None = None,
    ) -> None:
        exact = weight.detach().to("cpu", torch.float64)
        self.vectors = vectors
        self.image = exact @ vectors
        self.offset = torch.zeros(vectors.shape[1], dtype=torch.float64)
        self.norm = exact.norm()
        self.slack = (math.sqrt(len(exact)) + _SUMS) * (exact.square().sum(0) @ vectors.square()).sqrt()
        if bias is not None:
            self.add_bias(bias)

    def add_bias(self, bias: Float[Tensor, " out"]) -> None:
        """The product adds this to every row."""
        self.offset = self.offset + bias.detach().to("cpu", torch.float64) @ self.vectors

    def with_lora(
        self, lora: Lora | None
    ) -> tuple[Float64[Tensor, "in k"], Float64[Tensor, " k"], Float64[Tensor, ""]]:
        """Image, slack, and a bound of the Frobenius norm, of the product together with a LoRA pair."""
        if lora is None:
            return self.image, self.slack, self.norm
        down, up = (value.detach().to("cpu", torch.float64) for value in (lora.down, lora.up))
        inner = up.T @ self.vectors  # (rank, k)
        rows = down.square().sum(1)
        slack = math.sqrt(down.shape[1]) * (rows @ inner.square()).sqrt()
        outer = (up.square().sum(1) @ self.vectors.square()).sqrt()
        slack = slack + (math.sqrt(len(down)) + _SUMS) * rows.sum().sqrt() * outer
        scaling = abs(lora.scaling)
        norm = self.norm + scaling * down.norm() * up.norm()
        return self.image + lora.scaling * (down.T @ inner), self.slack + scaling * slack, norm


def excess(
    x: Float[Tensor, "*batch in"],
    y: Float[Tensor, "*batch out"],
    parts: list[tuple[Image, Lora | None]],
) -> float:
    """The largest of |Y·r - X·(W·r) - b·r| / τ over rows and vectors: above 1, Y is not the product. NaN in Y counts as ∞.

    Rows of X that are not finite, or so large that an honest product may overflow, are not judged.

    Args:
        x: what was multiplied; where several products were added up, their inputs side by side.
        y: what is said to have come out.
        parts: the products, in the order of their inputs in ``x``; their vectors are the same.
    """
    images, slacks, norms = zip(*(image.with_lora(lora) for image, lora in parts), strict=True)
    vectors, offset = parts[0][0].vectors, torch.stack([image.offset for image, _ in parts]).sum(0)
    info = torch.finfo(y.dtype)
    rows, out = _rows(x), _rows(y)
    sizes, answers = rows.norm(dim=1, keepdim=True), out.norm(dim=1, keepdim=True)
    scale = sizes * (torch.stack(slacks).norm(dim=0) * math.sqrt(len(parts)))
    difference = (out @ vectors - rows @ torch.cat(images) - offset).abs()
    stored = (out.square() @ vectors.square()).sqrt() + offset.abs()
    ours = (answers + sizes * torch.stack(norms).norm()) * vectors.norm(dim=0) + offset.abs()
    rounding = (
        info.eps / 2 * (scale + _SUMS * stored) + _OWN * (math.sqrt(out.shape[1]) + math.sqrt(rows.shape[1])) * ours
    )
    ratio = difference / (LAMBDA * rounding + info.tiny * rows.shape[1] * vectors.abs().sum(0))
    judged = scale.amax(1) < info.max * info.eps  # else its entries may be near the largest number there is
    found = torch.where(ratio.isfinite(), ratio, torch.inf)[judged]
    return float(found.max()) if found.numel() else 0.0


def _rows(values: Tensor) -> Float64[Tensor, "rows d"]:
    return values.detach().reshape(-1, values.shape[-1]).to("cpu", torch.float64)


@final
class FactorProjections(Secret):
    """Checks the gradients of one LoRA pair, dB = s·Σ Gᵀ·(X·Aᵀ) and dA = s·Σ (G·B)ᵀ·X, summed over a step's passes.

    With fresh secret vectors v (out) and w (in): vᵀ·dB = s·(A·Σ Xᵀ·(G·v))ᵀ and dA·w = s·Bᵀ·Σ Gᵀ·(X·w). The sums are of
    vectors, so no state need be kept from one pass to the next.

    *Bound.* As for products: an inner product over the N rows of a pass errs by √N·u, one over in or out channels by √in·u or
    √out·u, relative to the norms of what is multiplied.

    Args:
        up_vectors: v, (out, k).
        down_vectors: w, (in, k).
    """

    def __init__(self, up_vectors: Float64[Tensor, "out k"], down_vectors: Float64[Tensor, "in k"]) -> None:
        self._v, self._w = up_vectors, down_vectors
        self._through_x = torch.zeros_like(down_vectors)
        self._through_g = torch.zeros_like(up_vectors)
        self._x_slack = torch.zeros(up_vectors.shape[1], dtype=torch.float64)
        self._g_slack = torch.zeros_like(self._x_slack)
        self._size = 0.0
        self._passes = 0

    def add(self, x: Float[Tensor, "*batch in"], gradient: Float[Tensor, "*batch out"]) -> None:
        """One pass: the linear's input X and the gradient G of its output."""
        rows, g = _rows(x), _rows(gradient)
        gv, xw = g @ self._v, rows @ self._w
        self._through_x += rows.T @ gv
        self._through_g += g.T @ xw
        root = math.sqrt(len(rows))
        spread_v = (g.square().sum(0) @ self._v.square()).sqrt()
        spread_w = (rows.square().sum(0) @ self._w.square()).sqrt()
        self._x_slack += rows.norm() * (root * spread_v + math.sqrt(rows.shape[1]) * gv.norm(dim=0))
        self._g_slack += g.norm() * (root * spread_w + math.sqrt(g.shape[1]) * xw.norm(dim=0))
        widths = root + math.sqrt(rows.shape[1]) + math.sqrt(g.shape[1])
        self._size += widths * float(rows.norm() * g.norm())
        self._passes += 1

    def excess(self, lora: Lora, down: Float[Tensor, "rank in"], up: Float[Tensor, "out rank"]) -> float:
        """The largest |difference| / τ: above 1, ``down`` and ``up`` are not the gradients of the pair's A and B."""
        a, b = (value.detach().to("cpu", torch.float64) for value in (lora.down, lora.up))
        exact_down, exact_up = (value.detach().to("cpu", torch.float64) for value in (down, up))
        worst = 0.0
        for got, vectors, factor, through, slack in (
            (exact_up.T, self._v, a, self._through_x, self._x_slack),
            (exact_down, self._w, b.T, self._through_g, self._g_slack),
        ):
            difference = (got @ vectors - lora.scaling * factor @ through).abs()
            info, scaling = torch.finfo(up.dtype), abs(lora.scaling)
            norms = factor.norm(dim=1, keepdim=True)
            bound = scaling * norms * slack
            stored = (got.square() @ vectors.square()).sqrt()
            ours = math.sqrt(got.shape[1]) * got.norm(dim=1, keepdim=True) + scaling * norms * self._size
            rounding = info.eps / 2 * (bound + stored) + _OWN * ours * vectors.norm(dim=0)
            tiny = info.tiny * got.shape[1] * vectors.abs().sum(0)
            ratio = difference / (LAMBDA * (_SUMS + self._passes) * rounding + tiny)
            if float(bound.max()) < info.max * info.eps:  # else an overflow may be honest
                worst = max(worst, float(torch.where(ratio.isfinite(), ratio, torch.inf).max()))
        return worst
