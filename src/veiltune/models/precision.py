"""bfloat16 on a CPU: round every value between float32 operations, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def to_bfloat16_grid(x: Tensor) -> Tensor:
    """The nearest bfloat16 values, kept in ``x``'s own dtype."""
    return x.to(torch.bfloat16).to(x.dtype)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        return to_bfloat16_grid(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return to_bfloat16_grid(gradients[0])


def round_tensor(x: Tensor) -> Tensor:
    """Round a value on its way forward and its gradient on its way back."""
    return _Round.apply(x)


def round_between_operations(model: nn.Module) -> None:
    """Make each leaf module of ``model`` give bfloat16 values, and its frozen weights take them.

    Leaf modules are embeddings, norms, linears and activations: what a bfloat16 model rounds after. Inside a fused operation
    (attention, a norm) accelerators accumulate in float32, as is done here.
    """

    def rounded(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return round_tensor(output) if isinstance(output, Tensor) and output.is_floating_point() else output

    for module in model.modules():
        if next(module.children(), None) is None:
            module.register_forward_hook(rounded)
    for parameter in model.parameters():
        if not parameter.requires_grad and not parameter.is_meta:
            parameter.data = to_bfloat16_grid(parameter.data)
