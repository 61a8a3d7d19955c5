"""Masking keys: secret square matrices that hide activations and weights from whoever multiplies them.

Row vectors throughout. A key R hides states as X* = X·R and weights that read them as W* = R⁻¹·W, so that
X*·W* = X·W; weights that write hide their output as W* = W·R, and O = O*·R⁻¹. Gradients follow the transposed inverse:
dX* = dX·R⁻ᵀ.

*Reference*: ObfuscaTune (arXiv 2407.02960), which argues for a low condition number; Haar orthogonal matrices by QR
after Mezzadri, "How to generate random matrices from the classical compact groups", Notices of the AMS 54 (2007), §5.

*Reveals*, to whoever sees masked rows, under an orthogonal key: every norm and inner product of the rows (their Gram
matrix), hence which rows are equal. Keys are static: d independent known pairs (x, x·R) recover any dense key
exactly, and fewer a butterfly key. Gaussian and conditioned keys hide the Gram matrix and pay for it in accuracy.

*Bound*: see `privacy.bounds`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar, Final, TypeAlias, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from veiltune.errors import ConfigError, nearest
from veiltune.secrets import MasterSecret, Secret

_CHUNK_ELEMENTS: Final = 1 << 21  # weights are masked in float64 in slices of 16 MiB
_Stages: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


class Key(Secret, ABC):
    """A masking matrix R and its inverse, drawn in float64 at first use, applied in its argument's dtype and device.

    Everything is one operation: rows times R, R⁻¹, Rᵀ or R⁻ᵀ (:meth:`_times`); masking a weight from the left is the
    transposed case, since R⁻¹·W = (Wᵀ·R⁻ᵀ)ᵀ. Rows whose last dimension is not ``dim`` raise ValueError.
    See :func:`make_key` for the arguments.
    """

    kind: ClassVar[str]

    def __init__(self, dim: int, secret: MasterSecret, label: str, condition_number: float | None = None) -> None:
        if condition_number is not None:
            hint = "leave it out, or use the kind 'conditioned'"
            raise ConfigError(f"a {self.kind} key takes no condition number, got {condition_number}", hint=hint)
        self.dim: Final = dim
        self._secret: Final = secret
        self._label: Final = label
        self._condition_number = 1.0
        self._parts: tuple[Tensor, ...] | None = None
        self._casts: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}
        self._on_bfloat16_grid = False

    @property
    def condition_number(self) -> float:
        """The largest singular value over the smallest: by construction, or measured where a kind does not fix it."""
        return self._condition_number

    @property
    def known_pairs(self) -> int:
        """The fewest known pairs (x, x·R) that can settle the key: d, for a linear system, unless a kind says less."""
        return self.dim

    @abstractmethod
    def _draw(self) -> tuple[Tensor, ...]:
        """The matrices (float64) and orders that make up the key, from its secret and label."""

    @abstractmethod
    def _times(self, rows: Float[Tensor, "*batch d"], *, inverse: bool, transpose: bool) -> Float[Tensor, "*batch d"]:
        """Rows times R, inverted and transposed as asked, in their dtype and device; differentiable in ``rows``."""

    def mask(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """x·R."""
        return self._times(self._checked(x), inverse=False, transpose=False)

    def unmask(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """x·R⁻¹."""
        return self._times(self._checked(x), inverse=True, transpose=False)

    def mask_gradient(self, gradient: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """g·R⁻ᵀ: the gradient with respect to x·R from the one with respect to x."""
        return self._times(self._checked(gradient), inverse=True, transpose=True)

    def unmask_gradient(self, gradient: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """g·Rᵀ: the gradient with respect to x from the one with respect to x·R."""
        return self._times(self._checked(gradient), inverse=False, transpose=True)

    def mask_input_weight(self, weight: Float[Tensor, "d out"]) -> Float[Tensor, "d out"]:
        """R⁻¹·W for a weight that reads masked states; computed in float64, returned in the weight's dtype."""
        return self._in_float64(weight.T, inverse=True, transpose=True).T

    def unmask_input_weight(self, weight: Float[Tensor, "d out"]) -> Float[Tensor, "d out"]:
        """R·W, which undoes :meth:`mask_input_weight`."""
        return self._in_float64(weight.T, inverse=False, transpose=True).T

    def mask_output_weight(self, weight: Float[Tensor, "in d"]) -> Float[Tensor, "in d"]:
        """W·R for a weight that writes masked states; computed in float64, returned in the weight's dtype."""
        return self._in_float64(weight, inverse=False, transpose=False)

    def unmask_output_weight(self, weight: Float[Tensor, "in d"]) -> Float[Tensor, "in d"]:
        """W·R⁻¹, which undoes :meth:`mask_output_weight`."""
        return self._in_float64(weight, inverse=True, transpose=False)

    def matrix(self) -> Float64[Tensor, "d d"]:
        """R written out, float64 on the CPU: the slow, obvious twin of every method, for tests and attack controls."""
        return self.mask(torch.eye(self.dim, dtype=torch.float64))

    def release(self) -> None:
        """Free the float64 originals (they are derived again when next needed); compute-dtype copies stay."""
        self._parts = None

    def _in_float64(self, rows: Float[Tensor, "n d"], *, inverse: bool, transpose: bool) -> Float[Tensor, "n d"]:
        self._checked(rows)
        result = torch.empty_like(rows, requires_grad=False)
        step = max(1, _CHUNK_ELEMENTS // self.dim)
        with torch.no_grad():
            for part, target in zip(rows.split(step), result.split(step), strict=True):
                target.copy_(self._times(part.to(torch.float64), inverse=inverse, transpose=transpose))
        return result

    def _checked(self, rows: Tensor) -> Tensor:
        if rows.shape[-1] != self.dim:
            raise ValueError(f"{self!r} takes rows of {self.dim} numbers, got the shape {tuple(rows.shape)}")
        return rows

    def _exact(self) -> tuple[Tensor, ...]:
        if self._parts is None:
            with torch.inference_mode(mode=False), torch.no_grad():  # a later call may need them for a backward pass
                self._parts = self._draw()
        return self._parts

    def _cast(self, like: Tensor) -> tuple[Tensor, ...]:
        """The key in the dtype and device of ``like``, kept for the next call unless that is float64."""
        if like.dtype == torch.float64:
            return tuple(part.to(like.device) for part in self._exact())
        place = (like.dtype, like.device)
        if place not in self._casts:
            with torch.inference_mode(mode=False):
                here = [part.to(like.device) for part in self._exact()]
                self._casts[place] = tuple(self._rounded(part, like.dtype) for part in here)
        return self._casts[place]

    def settle(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make the copy that states of this dtype and device will need, then free the originals."""
        self._cast(torch.empty(0, dtype=dtype, device=device))
        self.release()

    def use_bfloat16_grid(self) -> None:
        """Round what is applied to states as bfloat16 would, whatever dtype computes: for studies on a CPU."""
        self._on_bfloat16_grid = True
        self._casts.clear()

    def _rounded(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        if not part.is_floating_point():
            return part
        return part.to(torch.bfloat16).to(dtype) if self._on_bfloat16_grid else part.to(dtype)

    def _describe(self) -> str:
        return f"Key {self.kind} dim={self.dim}"


class DenseKey(Key):
    """A key kept as full matrices, R and R⁻¹, or R alone where R⁻¹ = Rᵀ: a row costs d² multiplications."""

    def _times(self, rows: Float[Tensor, "*batch d"], *, inverse: bool, transpose: bool) -> Float[Tensor, "*batch d"]:
        matrices = self._cast(rows)
        if len(matrices) == 1:
            inverse, transpose = False, inverse != transpose
        matrix = matrices[1 if inverse else 0]
        return rows @ (matrix.T if transpose else matrix)


@final
class OrthogonalKey(DenseKey):
    """Haar-distributed on the orthogonal group: a masked row is uniform on its sphere, and κ = 1."""

    kind = "orthogonal"

    def _draw(self) -> tuple[Tensor, ...]:
        return (_haar(self._secret, self._label, 1, self.dim)[0],)


@final
class GaussianKey(DenseKey):
    """Independent N(0, 1/d) entries, the naive baseline: κ is a multiple of d, and accuracy suffers in proportion."""

    kind = "gaussian"

    def _draw(self) -> tuple[Tensor, ...]:
        matrix = self._secret.normal(f"{self._label}/gaussian", (self.dim, self.dim)) / math.sqrt(self.dim)
        return matrix, torch.linalg.inv(matrix)

    @cached_property
    def condition_number(self) -> float:
        """Measured by singular values, once."""
        return float(torch.linalg.cond(self._exact()[0]))


@final
class ConditionedKey(DenseKey):
    """R = Q_A·S·Q_Bᵀ with Haar Q and a prescribed κ, to show how the error grows with κ.

    The singular values in S are evenly spaced in logarithm from √κ to 1/√κ, so that their geometric mean is 1.
    """

    kind = "conditioned"

    def __init__(self, dim: int, secret: MasterSecret, label: str, condition_number: float | None = None) -> None:
        super().__init__(dim, secret, label)
        if condition_number is None or not 1.0 <= condition_number < math.inf or (dim == 1 and condition_number > 1.0):
            hint = "give a finite number of at least 1 (and exactly 1 when the dimension is 1)"
            raise ConfigError(f"a conditioned key of dimension {dim} cannot have κ = {condition_number}", hint=hint)
        self._condition_number = float(condition_number)

    def _draw(self) -> tuple[Tensor, ...]:
        left, right = (_haar(self._secret, f"{self._label}/{side}", 1, self.dim)[0] for side in ("left", "right"))
        scale = torch.linspace(0.5, -0.5, self.dim, dtype=torch.float64).mul_(math.log(self._condition_number)).exp_()
        return (left * scale) @ right.T, (right / scale) @ left.T


@final
class ButterflyKey(Key):
    """An exactly orthogonal key (κ = 1) that costs d·(a + b) multiplications a row instead of d², where d = a·b.

    R = P · diag(B_1 … B_a) · T · diag(A_1 … A_b) · Q: a secret permutation P deals the coordinates into a groups of b;
    a Haar block of size b turns each group; T (reshape to a by b, transpose) regroups, so that each new group takes one
    coordinate of each old one; a Haar block of size a turns each of those; a secret permutation Q scatters the result.
    Every output depends on every input, and E[R_ij²] = 1/d as under Haar measure. A secret permutation in the middle
    would add nothing: those that keep the regrouping are absorbed by the Haar blocks, and others leave each output
    ignorant of about a third of the inputs.

    *Reveals*: what an orthogonal key does, and it is weaker: besides two permutations it has d·(a + b - 2)/2 degrees of
    freedom, not d·(d - 1)/2. As n known pairs give n·d - n·(n + 1)/2 independent equations (their Gram matrix is known
    beforehand), about (a + b)/2 pairs settle it: 24 at d = 576, where a dense key takes 576. That is what counting
    permits; the equations are bilinear, so solving them takes more work. Prefer ``orthogonal`` unless time presses.

    Raises:
        ConfigError: the dimension is prime, or below 4.
    """

    kind = "butterfly"

    def __init__(self, dim: int, secret: MasterSecret, label: str, condition_number: float | None = None) -> None:
        super().__init__(dim, secret, label, condition_number)
        a = max((n for n in range(2, math.isqrt(dim) + 1) if dim % n == 0), default=0)
        if not a:
            hint = "use the key kind 'orthogonal', which takes any dimension"
            raise ConfigError(f"a butterfly key needs a dimension with two factors of at least 2, got {dim}", hint=hint)
        self.factors: Final = (a, dim // a)

    def _draw(self) -> tuple[Tensor, ...]:
        a, b = self.factors
        first, last = (self._secret.permutation(f"{self._label}/{side}", self.dim) for side in ("first", "last"))
        inner = _haar(self._secret, f"{self._label}/inner", a, b)
        outer = _haar(self._secret, f"{self._label}/outer", b, a)
        return first, inner, outer, last, first.argsort(), last.argsort()

    @property
    def known_pairs(self) -> int:
        """The least n with n·d - n·(n + 1)/2 ≥ d·(a + b - 2)/2."""
        unknown = self.dim * (sum(self.factors) - 2)
        return next(n for n in range(1, self.dim + 1) if n * (2 * self.dim - n - 1) >= unknown)

    def _times(self, rows: Float[Tensor, "*batch d"], *, inverse: bool, transpose: bool) -> Float[Tensor, "*batch d"]:
        first, inner, outer, last, undo_first, undo_last = self._cast(rows)
        stages = (first, inner, outer, last)
        transposed = (undo_last, outer.mT, inner.mT, undo_first)
        if inverse != transpose:
            stages, transposed = transposed, stages
        return _Butterfly.apply(rows.reshape(-1, self.dim), stages, transposed).view(rows.shape)


class _Butterfly(torch.autograd.Function):
    """Rows times a butterfly; its backward is the transposed butterfly (autograd's own gathers would be far slower)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, stages: _Stages, transposed: _Stages) -> Tensor:  # pyrefly: ignore[bad-override]
        ctx.stages = transposed, stages
        gather, inner, outer, scatter = stages
        n, a, b = len(rows), len(inner), len(outer)
        # The layouts are chosen so that each product takes its input where it lies: only the last one is copied.
        groups = rows.index_select(1, gather).view(n, a, b).permute(1, 2, 0)
        turned = torch.bmm(inner.mT, groups)  # (a, b, n)
        mixed = torch.bmm(turned.permute(1, 2, 0), outer)  # (b, n, a)
        return mixed.transpose(0, 1).reshape(n, a * b).index_select(1, scatter)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Butterfly.apply(gradients[0], *ctx.stages), None, None


def _haar(secret: MasterSecret, label: str, count: int, dim: int) -> Float64[Tensor, "count d d"]:
    """Independent Haar orthogonal matrices: QR of Gaussian ones, with the signs that make R's diagonal positive.

    Without the signs the distribution depends on the QR routine and is not Haar (Mezzadri 2007, §5).
    """
    factors, tau = torch.geqrf(secret.normal(f"{label}/haar", (count, dim, dim)))
    signs = torch.where(factors.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(torch.float64)
    torch.linalg.householder_product(factors, tau, out=factors)
    return factors.mul_(signs.unsqueeze(-2))


KEY_KINDS: Final[dict[str, type[Key]]] = {
    cls.kind: cls for cls in (OrthogonalKey, GaussianKey, ConditionedKey, ButterflyKey)
}
"""Every kind of key by its configuration name; a new kind is one class and one entry."""


def make_key(kind: str, dim: int, secret: MasterSecret, label: str, condition_number: float | None = None) -> Key:
    """The key of ``kind`` that ``secret`` has for ``label``: the same arguments give the same key.

    Args:
        kind: a name of :data:`KEY_KINDS`.
        dim: d, the length of the rows to be masked.
        secret: the session's master secret.
        label: what the key is for, unique within the session.
        condition_number: κ ≥ 1 for the kind ``conditioned``, and for it alone.

    Raises:
        ConfigError: an unknown kind, an impossible dimension, or a κ that is missing, impossible or not wanted.
    """
    if kind not in KEY_KINDS:
        raise ConfigError(f"unknown key kind {kind!r}", hint=nearest(kind, KEY_KINDS))
    if dim < 1:
        raise ConfigError(f"a key needs a dimension of at least 1, got {dim}", hint="pass the hidden states' width")
    return KEY_KINDS[kind](dim, secret, label, condition_number)
