"""A public orthogonal rotation of the channels, so that a few outlier channels do not own a quantiser's scale.

*Reference.* Rotating activations by a randomised Hadamard matrix before rounding them: QuaRot (arXiv 2404.00456); its incoherence
argument is that of QuIP (arXiv 2307.13304). The form for widths that are no power of two is ours.

*Symbols.* Row vectors. R = S·(F₁ ⊗ … ⊗ F_k): S holds public signs, and each F_i is H ⊗ C of order n_i <= 64, with H the Sylvester
Hadamard matrix of the power of two in n_i and C the orthonormal DCT-II of the odd rest. A channel of size a comes out with no
coordinate above a·√(2^o/d), o the number of factors with an odd rest, instead of one of size a. A row costs d·(n₁ + … + n_k)
multiplications instead of d². A width with a prime factor above 64 has no such product: two rotations of the nearest smaller
width that has one, of the first and then of the last channels, overlap to cover it.

*Reveals.* R is a function of d alone and hides nothing: whoever receives x·R knows x.

*Bound.* R is orthogonal by construction; x·R·R⁻¹ returns x to a few roundings, relative to the norm of its row.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST_FACTOR: Final = 64


class _Rotation(NamedTuple):
    width: int
    """The channels that one pass mixes: all of them, or the first and then the last so many."""
    factors: tuple[Tensor, ...]
    signs: tuple[Tensor, ...]
    """One vector of ±1 a pass."""


def rotate(rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """rows·R, in their dtype and on their device; differentiable."""
    rotation, rows = _rotation(rows.shape[-1], rows.dtype, rows.device), rows.contiguous()
    for part, signs in enumerate(rotation.signs):
        head, middle, tail = _split(rows, rotation.width, last=part == 1)
        rows = _join(head, _times(middle * signs, rotation.factors), tail)
    return rows


def unrotate(rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """rows·R⁻¹ = rows·Rᵀ, in their dtype and on their device; differentiable."""
    rotation, rows = _rotation(rows.shape[-1], rows.dtype, rows.device), rows.contiguous()
    transposed = tuple(factor.T for factor in rotation.factors)
    for part, signs in reversed(list(enumerate(rotation.signs))):
        head, middle, tail = _split(rows, rotation.width, last=part == 1)
        rows = _join(head, _times(middle, transposed) * signs, tail)
    return rows


def _split(rows: Tensor, width: int, *, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    rest = rows.shape[-1] - width
    head, middle, tail = rows.split((rest, width, 0) if last else (0, width, rest), dim=-1)
    return head, middle, tail


def _join(head: Tensor, middle: Tensor, tail: Tensor) -> Tensor:
    if not head.shape[-1] and not tail.shape[-1]:
        return middle
    return torch.cat([head, middle, tail], dim=-1)


def _times(rows: Float[Tensor, "*batch width"], factors: tuple[Tensor, ...]) -> Float[Tensor, "*batch width"]:
    """rows·(F₁ ⊗ … ⊗ F_k), one factor at a time, the last (and largest) as one plain product."""
    shape, after = rows.shape, 1
    for factor in reversed(factors):
        order = len(factor)
        rows = rows.reshape(-1, order) @ factor if after == 1 else factor.T @ rows.reshape(-1, order, after)
        after *= order
    return rows.reshape(shape)


@lru_cache(maxsize=16)
def _rotation(dim: int, dtype: torch.dtype, device: torch.device) -> _Rotation:
    if dim < 1:
        raise ValueError(f"a rotation needs at least one channel, got {dim}")
    width = dim
    while (orders := _orders(width)) is None:
        width -= 1
    with torch.inference_mode(mode=False), torch.no_grad():  # a later call may need them for a backward pass
        factors = tuple(_factor(order).to(device, dtype) for order in orders)
        labels = ("first",) if width == dim else ("first", "last")
        return _Rotation(width, factors, tuple(_signs(label, width).to(device, dtype) for label in labels))


def _orders(width: int) -> tuple[int, ...] | None:
    """Factors of ``width`` of at most 64, ascending and few, or None where there are none. O(log width) divisions."""
    orders: list[int] = []
    while width > 1:
        order = next((n for n in range(min(LARGEST_FACTOR, width), 1, -1) if width % n == 0), 0)
        if not order:
            return None
        orders.append(order)
        width //= order
    return tuple(sorted(orders)) or (1,)


def _factor(order: int) -> Float[Tensor, "order order"]:
    """H ⊗ C: Sylvester's Hadamard matrix of the power of two in ``order``, the DCT-II of the rest; float64."""
    two = order & -order
    odd = order // two
    wave = torch.arange(odd, dtype=torch.float64)
    cosine = (torch.outer(wave, wave + 0.5) * (math.pi / odd)).cos() * math.sqrt(2 / odd)
    cosine[0] = math.sqrt(1 / odd)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(two.bit_length() - 1):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    return torch.kron(hadamard / math.sqrt(two), cosine)


def _signs(label: str, width: int) -> Float[Tensor, " width"]:
    """Public signs that depend on nothing but their arguments, on any machine and version of torch."""
    text = hashlib.shake_256(f"veiltune rotation 1 {label} {width}".encode()).digest(-(-width // 8))
    drawn = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    bits = (drawn.unsqueeze(-1) >> torch.arange(8)) & 1
    return (1.0 - 2.0 * bits.flatten()[:width]).double()
