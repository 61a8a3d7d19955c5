"""Invertible linear maps S on rows, each with what folding and LoRA need: rows·S, rows·S⁻¹, rows·Sᵀ and the dual S⁻ᵀ.

A weight W (in, out) becomes L·W·P with L acting on its input side and P on its output side. Stored as rows, both sides are one
operation: the columns of W, of length *in*, are multiplied by Lᵀ, and its rows, of length *out*, by P. A LoRA pair ΔW = A·B goes
along: lora_A = Aᵀ by the first map, the rows of lora_Bᵀ = B by the second. Gradients go back by the transpose: if Y* = Y·S then
dY = dY*·Sᵀ.

Maps hold float64 and compute in the dtype of what they are given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Complex, Float, Float64, Int
from torch import Tensor

from veiltune.secrets import Secret

Rows = Float[Tensor, "n d"]


class LinearMap(Secret, ABC):
    """One map S, of rows of length d to rows of length d. Its repr says nothing of its numbers."""

    @abstractmethod
    def apply(self, rows: Rows) -> Rows:
        """rows·S."""

    @abstractmethod
    def undo(self, rows: Rows) -> Rows:
        """rows·S⁻¹."""

    @abstractmethod
    def pull_back(self, rows: Rows) -> Rows:
        """rows·Sᵀ: the gradient in Y from that in Y·S."""


class InnerMap(LinearMap):
    """A map inside a block, whose dual is one of the same kind."""

    @abstractmethod
    def dual(self) -> InnerMap:
        """S⁻ᵀ: what the linear that reads rows·S meets, on its input side."""


@final
class Same(InnerMap):
    """S = I."""

    def apply(self, rows: Rows) -> Rows:
        """See `LinearMap.apply`."""
        return rows

    def undo(self, rows: Rows) -> Rows:
        """See `LinearMap.undo`."""
        return rows

    def pull_back(self, rows: Rows) -> Rows:
        """See `LinearMap.pull_back`."""
        return rows

    def dual(self) -> Same:
        """See `InnerMap.dual`."""
        return self


@final
class ScaledOrder(InnerMap):
    """A permutation, then a factor for each coordinate: (rows·S)_j = rows_{order_j}·scale_j."""

    def __init__(self, order: Int[Tensor, " d"], scale: Float64[Tensor, " d"]) -> None:
        self._order = order
        self._scale = scale
        self._back = order.argsort()

    def apply(self, rows: Rows) -> Rows:
        """See `LinearMap.apply`."""
        return rows.index_select(-1, self._order.to(rows.device)) * self._scale.to(rows)

    def undo(self, rows: Rows) -> Rows:
        """See `LinearMap.undo`."""
        return (rows / self._scale.to(rows)).index_select(-1, self._back.to(rows.device))

    def pull_back(self, rows: Rows) -> Rows:
        """See `LinearMap.pull_back`."""
        return (rows * self._scale.to(rows)).index_select(-1, self._back.to(rows.device))

    def dual(self) -> ScaledOrder:
        """See `InnerMap.dual`."""
        return ScaledOrder(self._order, 1 / self._scale)


class _ByHead(InnerMap):
    """Heads in another order, then a map of its own for each."""

    def __init__(self, order: Int[Tensor, " heads"], width: int) -> None:
        self._order = order
        self._back = order.argsort()
        self._width = width

    @abstractmethod
    def _turn(self, heads: Float[Tensor, "n heads w"], *, inverse: bool, transpose: bool) -> Float[Tensor, "n heads w"]:
        """Each head, in the new order, times its own matrix, its inverse, transpose or both."""

    def _heads(self, rows: Rows) -> Float[Tensor, "n heads w"]:
        return rows.reshape(len(rows), -1, self._width)

    def apply(self, rows: Rows) -> Rows:
        """See `LinearMap.apply`."""
        ordered = self._heads(rows).index_select(1, self._order.to(rows.device))
        return self._turn(ordered, inverse=False, transpose=False).flatten(1)

    def undo(self, rows: Rows) -> Rows:
        """See `LinearMap.undo`."""
        turned = self._turn(self._heads(rows), inverse=True, transpose=False)
        return turned.index_select(1, self._back.to(rows.device)).flatten(1)

    def pull_back(self, rows: Rows) -> Rows:
        """See `LinearMap.pull_back`."""
        turned = self._turn(self._heads(rows), inverse=False, transpose=True)
        return turned.index_select(1, self._back.to(rows.device)).flatten(1)


@final
class HeadRotations(_ByHead):
    """An orthogonal matrix for each head: S⁻¹ = Sᵀ."""

    def __init__(self, order: Int[Tensor, " heads"], blocks: Float64[Tensor, "heads w w"]) -> None:
        super().__init__(order, blocks.shape[-1])
        self._blocks = blocks

    def _turn(self, heads: Float[Tensor, "n heads w"], *, inverse: bool, transpose: bool) -> Float[Tensor, "n heads w"]:
        blocks = self._blocks.to(heads)
        return torch.einsum("nhi,hij->nhj", heads, blocks.mT if inverse != transpose else blocks)

    def dual(self) -> HeadRotations:
        """See `InnerMap.dual`."""
        return self


@final
class PairTurns(_ByHead):
    """Within each head, coordinates i and i + w/2 taken as one complex number and multiplied by z: what commutes with rotary.

    As a real 2 × 2 matrix on a row, multiplying by z has as transpose multiplying by its conjugate.
    """

    def __init__(self, order: Int[Tensor, " heads"], turns: Complex[Tensor, "heads half"]) -> None:
        super().__init__(order, 2 * turns.shape[-1])
        self._turns = turns

    def _turn(self, heads: Float[Tensor, "n heads w"], *, inverse: bool, transpose: bool) -> Float[Tensor, "n heads w"]:
        z = 1 / self._turns if inverse else self._turns
        cos, sin = z.real.to(heads), (-z.imag if transpose else z.imag).to(heads)
        x, y = heads.chunk(2, dim=-1)
        return torch.cat([x * cos - y * sin, x * sin + y * cos], dim=-1)

    def dual(self) -> PairTurns:
        """See `InnerMap.dual`."""
        return PairTurns(self._order, 1 / self._turns.conj())


@final
class Joined(InnerMap):
    """Maps side by side, each on its own part of a row (a fused QKV)."""

    def __init__(self, parts: Sequence[InnerMap], widths: Sequence[int]) -> None:
        self._parts = tuple(parts)
        self._widths = list(widths)

    def apply(self, rows: Rows) -> Rows:
        """See `LinearMap.apply`."""
        pieces = rows.split(self._widths, dim=-1)
        return torch.cat([part.apply(piece) for part, piece in zip(self._parts, pieces, strict=True)], dim=-1)

    def undo(self, rows: Rows) -> Rows:
        """See `LinearMap.undo`."""
        pieces = rows.split(self._widths, dim=-1)
        return torch.cat([part.undo(piece) for part, piece in zip(self._parts, pieces, strict=True)], dim=-1)

    def pull_back(self, rows: Rows) -> Rows:
        """See `LinearMap.pull_back`."""
        pieces = rows.split(self._widths, dim=-1)
        return torch.cat([part.pull_back(piece) for part, piece in zip(self._parts, pieces, strict=True)], dim=-1)

    def dual(self) -> Joined:
        """See `InnerMap.dual`."""
        return Joined([part.dual() for part in self._parts], self._widths)
