"""Norms as the host runs them: without gain, since a gain is folded into what reads the norm.

Each computes in the dtype of its input if that is float64, and in float32 or better inside if it is half.
"""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from veiltune.models.family import Family


def epsilon(norm: Any) -> float:
    """The ε of any norm of `transformers` or torch."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


@final
class StreamNorm(nn.Module):
    """n* = RMSNorm(x*), plus the constant channel 1·R where a LayerNorm with a bias was (`models.rotated.rotation`)."""

    def __init__(self, dim: int, eps: float, *, has_constant: bool, like: Tensor | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.constant = _frozen(like, dim) if has_constant else None

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """As the norm it stands for."""
        normed = functional.rms_norm(x, (self.dim,), None, self.eps)
        return normed if self.constant is None else normed + self.constant


@final
class SandwichNorm(nn.Module):
    """RMSNorm(x*)·R⁻¹·diag(g)·R: a norm with a gain on a branch's output. ``gain`` is that matrix, (d, d)."""

    def __init__(self, dim: int, eps: float, like: Tensor | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.gain = _frozen(like, dim, dim)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """As the norm it stands for."""
        return functional.rms_norm(x, (self.dim,), None, self.eps) @ self.gain


@final
class GainNorm(nn.Module):
    """RMSNorm(x)·diag(g), with the gain as it acts, whatever a family stores of it; and in full float64 where asked."""

    def __init__(self, dim: int, eps: float, like: Tensor | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.gain = _frozen(like, dim)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """As the norm it stands for."""
        return functional.rms_norm(x, (self.dim,), None, self.eps) * self.gain


def _frozen(like: Tensor | None, *shape: int) -> nn.Parameter:
    value = (
        torch.empty(shape, device="meta") if like is None else torch.empty(shape, dtype=like.dtype, device=like.device)
    )
    return nn.Parameter(value, requires_grad=False)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is one of `transformers`' RMSNorms."""
    return type(module).__name__.endswith("RMSNorm")


def compute_norms_in_float64(model: nn.Module, family: Family) -> None:
    """Replace the RMSNorms of a float64 model, which `transformers` computes in float32 whatever the model's dtype.

    Without this a float64 model is exact to float32 only, and nothing can be shown with it that float32 does not show.
    """
    for path, module in list(model.named_modules()):
        if is_rms_norm(module) and module.weight is not None:
            weight: Any = module.weight
            precise = GainNorm(weight.shape[0], epsilon(module), like=weight)
            precise.gain.data = weight.detach() + family.gain_offset
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, precise)
