"""Compressed linears: truncated singular value decomposition, and integers with one scale a group.

All weights here are (out, in), `nn.Linear`'s way; a `Conv1D` weight is transposed before and never after, since the modules
below stand in for either.

*Reference.* Eckart and Young 1936: of all matrices of rank r, the truncated SVD is nearest in the Frobenius norm, at the distance
√(σ²_{r+1} + … + σ²_n).

*Bound.* Quantised: every weight is within half its group's scale, max|w| / (2^(bits-1) - 1).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor, nn

_LEVELS = {8: 127, 4: 7}
_OFFSET = {8: 128, 4: 8}  # added to a signed code so that it fits an unsigned field


def factorise(weight: Float[Tensor, "out in"], rank: int) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """The factors ``down`` and ``up`` of the nearest matrix up·down of rank ``rank``, in the weight's dtype.

    The singular values are shared evenly: each factor gets their square roots.
    """
    exact = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
    left, singular, right = torch.linalg.svd(exact, full_matrices=False)
    root = singular[:rank].sqrt()
    down, up = root.unsqueeze(1) * right[:rank], left[:, :rank] * root
    return down.to(weight.dtype).contiguous(), up.to(weight.dtype).contiguous()


def is_smaller(rank: int, rows: int, columns: int) -> bool:
    """Whether two factors of this rank hold fewer numbers than the matrix."""
    return rank * (rows + columns) < rows * columns


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, int]:
    """Shape of the bytes that hold a (rows, columns) matrix of ``bits``-wide codes; every row starts a new byte."""
    return rows, -(-columns * bits // 8)


def scales_shape(rows: int, columns: int, group: int) -> tuple[int, int]:
    """Shape of the scales: one for every ``group`` columns of a row, the last group possibly shorter."""
    return rows, -(-columns // group)


def pack(codes: Int[Tensor, "rows columns"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Signed codes as bytes: one a byte, or two (the even column in the low half; an odd last one beside a zero code)."""
    unsigned = (codes + _OFFSET[bits]).to(torch.uint8)
    if bits == 8:
        return unsigned
    if codes.shape[1] % 2:
        unsigned = nn.functional.pad(unsigned, (0, 1), value=_OFFSET[bits])
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def unpack(packed: UInt8[Tensor, "rows bytes"], bits: int, columns: int) -> Int[Tensor, "rows columns"]:
    """Undo `pack`: signed codes, as int8."""
    if bits == 4:
        packed = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :columns]
    return (packed.to(torch.int16) - _OFFSET[bits]).to(torch.int8)


def quantise(
    weight: Float[Tensor, "out in"], bits: int, group: int
) -> tuple[UInt8[Tensor, "out bytes"], Float32[Tensor, "out groups"]]:
    """Symmetric integers and their scales, one for every ``group`` weights of a row."""
    rows, columns = weight.shape
    groups = scales_shape(rows, columns, group)[1]
    padded = nn.functional.pad(weight.to(torch.float32), (0, groups * group - columns)).view(rows, groups, group)
    scales = padded.abs().amax(dim=2) / _LEVELS[bits]
    divisor = torch.where(scales > 0, scales, 1.0).unsqueeze(2)  # a group of zeros has scale 0 and codes 0
    codes = (padded / divisor).round_().clamp_(-_LEVELS[bits], _LEVELS[bits]).to(torch.int16)
    return pack(codes.view(rows, -1)[:, :columns], bits), scales


def dequantise(
    packed: UInt8[Tensor, "out bytes"],
    scales: Float[Tensor, "out groups"],
    *,
    columns: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> Float[Tensor, "out in"]:
    """The weight that the integers stand for, in ``dtype``."""
    each = scales.to(dtype).repeat_interleave(group, dim=1)[:, :columns]
    return unpack(packed, bits, columns).to(dtype) * each


def relative_error(weight: Float[Tensor, "out in"], approximation: Float[Tensor, "out in"]) -> float:
    """‖W - Ŵ‖ / ‖W‖ in the Frobenius norm; 0 for a weight of zeros."""
    exact = weight.to(torch.float64)
    norm = float(exact.norm())
    return float((exact - approximation.to(torch.float64)).norm()) / norm if norm else 0.0


class LowRankLinear(nn.Module):
    """y = (x·downᵀ)·upᵀ + b, frozen: two thin products in the place of a linear or a `Conv1D`.

    Args:
        down: the first factor.
        up: the second factor.
        bias: added to the output, or ``None``.
    """

    def __init__(
        self, down: Float[Tensor, "r in"], up: Float[Tensor, "out r"], bias: Float[Tensor, "out"] | None
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The product with the matrix of low rank."""
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for the printed model."""
        return f"in={self.down.shape[1]}, out={self.up.shape[0]}, rank={self.down.shape[0]}"


class QuantisedLinear(nn.Module):
    """A frozen linear kept as packed integers; its weight exists only while it is multiplied, forward or backward.

    Args:
        packed: codes, see `pack`.
        scales: one for every ``group`` inputs of an output.
        bias: added to the output, or ``None``.
        in_features: width of the input.
        bits: 8 or 4.
        group: inputs that share a scale.
    """

    def __init__(
        self,
        packed: UInt8[Tensor, "out bytes"],
        scales: Float32[Tensor, "out groups"],
        bias: Float[Tensor, "out"] | None,
        *,
        in_features: int,
        bits: int,
        group: int,
    ) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_features, self.bits, self.group = in_features, bits, group

    def weight_in(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The dequantised weight."""
        packed, scales = self.get_buffer("packed"), self.get_buffer("scales")
        return dequantise(packed, scales, columns=self.in_features, bits=self.bits, group=self.group, dtype=dtype)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The product with the dequantised weight."""
        y = _QuantisedProduct.apply(x, self)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Sizes, for the printed model."""
        out = self.get_buffer("packed").shape[0]
        return f"in={self.in_features}, out={out}, bits={self.bits}, group={self.group}"


class _QuantisedProduct(torch.autograd.Function):
    """x·Wᵀ, whose graph keeps the integers: autograd's own would hold every dequantised weight until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantisedLinear) -> Tensor:  # pyrefly: ignore[bad-override]
        ctx.linear = linear
        return x @ linear.weight_in(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.linear.weight_in(gradients[0].dtype), None
