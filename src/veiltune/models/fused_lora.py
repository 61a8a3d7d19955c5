"""Linears with LoRA that read the same input, as one node of autograd with few passes over the activations.

PEFT computes x·Wᵀ + s·((x·Aᵀ)·Bᵀ) one operation after another: a multiplication by s and an addition go over every output, and
autograd goes over them again on the way back and adds up the input's gradient once for each branch. Here the correction is
accumulated inside the matrix products, forward and backward, and Q, K and V (or gate and up) share one product with their A's.
PEFT's modules stay where they are, with their parameters and names; only their ``forward`` is another.

*Reference.* Hu et al. 2021 (LoRA); the slow twin is `peft.tuners.lora.layer.Linear.forward`.

*Symbols.* For member i of a group, with G_i the gradient of Y_i:

- Y_i = X·W_iᵀ + b_i + s_i·H_i·B_iᵀ, where H_i = X·A_iᵀ;
- dH_i = s_i·G_i·B_i, dB_i = s_i·G_iᵀ·H_i, dA_i = dH_iᵀ·X;
- dX = Σ_i G_i·W_i + dH_i·A_i. W_i and b_i are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veiltune.models.adapters import ADAPTER

FEW_ROWS = 32
"""Where both ways took the same time without a gradient (a block of SmolLM2's width, one thread); at one row PEFT's took 0.89."""


class _Frozen(NamedTuple):
    """What a member does not train: weight (out, in), bias (out,) or None, and the scaling s."""

    weight: Tensor
    bias: Tensor | None
    scaling: float


class _FusedLora(torch.autograd.Function):
    """The members' outputs from their common input; ``factors`` are all A's, then all B's, in the members' order."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, x: Tensor, members: Sequence[_Frozen], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        downs, ups = factors[: len(members)], factors[len(members) :]
        rows = x.reshape(-1, x.shape[-1])
        stacked = torch.cat(downs)
        inner = rows @ stacked.T
        outputs: list[Tensor] = []
        for member, up, part in zip(members, ups, inner.split([len(down) for down in downs], dim=1), strict=True):
            weight = member.weight.T
            out = rows @ weight if member.bias is None else torch.addmm(member.bias, rows, weight)
            out.addmm_(part, up.T, alpha=member.scaling)
            outputs.append(out.view(*x.shape[:-1], -1))
        ctx.save_for_backward(rows, inner, stacked, *ups, *(member.weight for member in members))
        ctx.ranks, ctx.scalings, ctx.shape = [len(down) for down in downs], [m.scaling for m in members], x.shape
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        rows, inner, stacked, *rest = ctx.saved_tensors
        ups, weights = rest[: len(gradients)], rest[len(gradients) :]
        flat = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        d_inner = torch.cat([g @ (up * s) for g, up, s in zip(flat, ups, ctx.scalings, strict=True)], dim=1)
        d_downs = (d_inner.T @ rows).split(ctx.ranks)
        parts = inner.split(ctx.ranks, dim=1)
        d_ups = [(g.T @ part).mul_(s) for g, part, s in zip(flat, parts, ctx.scalings, strict=True)]
        if not ctx.needs_input_grad[0]:
            return (None, None, *d_downs, *d_ups)
        dX = flat[0] @ weights[0]  # a product this wide hides what writing fresh memory costs
        for g, weight in zip(flat[1:], weights[1:], strict=True):
            dX.addmm_(g, weight)
        dX.addmm_(d_inner, stacked)
        return (dX.view(ctx.shape), None, *d_downs, *d_ups)


@final
class LoraGroup:
    """PEFT layers of one input: whichever is called first computes for all, the others take what came with it.

    Args:
        layers: PEFT's LoRA layers around `nn.Linear` or `Conv1D`, called with the same tensor in any order.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers: tuple[Any, ...] = tuple(layers)
        self._slow: tuple[Callable[..., Tensor], ...] = tuple(layer.forward for layer in self._layers)
        self._source: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def install(self) -> None:
        """Give each layer its share of the group as its ``forward``."""
        for position, layer in enumerate(self._layers):
            layer.forward = _Share(self, position)

    def member(self, position: int, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Output of the layer at ``position``: the fused one, or PEFT's own where fusing would change the result."""
        if self._source is x and position in self._waiting:
            output = self._waiting.pop(position)
            if not self._waiting:
                self._source = None
            return output
        if _is_short(x) or not all(_fusible(layer, x) for layer in self._layers):
            return self._slow[position](x)
        outputs = self._compute(x)
        self._waiting = {number: value for number, value in enumerate(outputs) if number != position}
        self._source = x if self._waiting else None
        return outputs[position]

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        members = [
            _Frozen(_out_in(layer.base_layer), layer.base_layer.bias, layer.scaling[ADAPTER]) for layer in self._layers
        ]
        downs = (layer.lora_A[ADAPTER].weight for layer in self._layers)
        ups = (layer.lora_B[ADAPTER].weight for layer in self._layers)
        return _FusedLora.apply(x, members, *downs, *ups)


@final
class _Share:
    """One layer's ``forward`` as a member of a group."""

    def __init__(self, group: LoraGroup, position: int) -> None:
        self._group = group
        self._position = position

    def __call__(self, x: Tensor) -> Tensor:
        return self._group.member(self._position, x)


def _is_short(x: Tensor) -> bool:
    """Whether PEFT's own layers are faster: a token or a few without a gradient, as in generation."""
    return not torch.is_grad_enabled() and x.numel() < FEW_ROWS * x.shape[-1]


def _out_in(linear: nn.Module) -> Tensor:
    """The weight of an `nn.Linear`, or of a `Conv1D` (which keeps it transposed), as (out, in)."""
    weight = linear.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(linear).__name__} has no weight")
    return weight if isinstance(linear, nn.Linear) else weight.T


def _fusible(layer: Any, x: Tensor) -> bool:
    """Whether PEFT would compute what the docstring of this module says: one plain adapter, active, unmerged, frozen base.

    Dropout that acts, and precisions that differ (PEFT casts between them), are left to PEFT.
    """
    if layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER]:
        return False
    if ADAPTER in layer.lora_variant or layer.lora_bias[ADAPTER]:
        return False
    if layer.training and getattr(layer.lora_dropout[ADAPTER], "p", 0.0) > 0:
        return False
    base = layer.base_layer
    frozen = (base.weight,) if base.bias is None else (base.weight, base.bias)
    trained = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
    return all(value.dtype == x.dtype for value in (*frozen, *trained)) and not any(v.requires_grad for v in frozen)


def fuse_lora(block: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Fuse the LoRA layers at these paths of ``block``; each group reads one input. What is no LoRA layer stays as it is.

    Fused layers skip their inner modules, so hooks on those would no longer run.
    """
    from peft.tuners.lora.layer import Linear

    for paths in groups:
        layers = [layer for layer in map(block.get_submodule, paths) if isinstance(layer, Linear)]
        if layers:
            LoraGroup(layers).install()
