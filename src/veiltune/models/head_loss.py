"""Cross-entropy of a frozen head, a few rows of logits at a time: logits are by far the largest activation, and none stay.

The gradient of Σ -log softmax(h·Wᵀ)[label] in h is (softmax - onehot)·W. It needs nothing of a row but its logits, so it is made
in their memory as soon as they are there, and the backward pass has only to hand it on. torch's `linear_cross_entropy` has the
same idea; on a CPU its chunks took eleven times as long as the whole product (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK: int = 128
"""Rows of logits at a time. Any number from 128 on took the same time (SmolLM2's head on a CPU)."""


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            logits = hidden[rows] @ weight.T
            logits = logits if logits.dtype == torch.float64 else logits.float()
            index = labels[rows, None]
            picked, largest = logits.gather(1, index), logits.amax(1, keepdim=True)
            sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
            total += (sums.log() + largest - picked).sum(dtype=torch.float64)
            if gradient is not None:
                logits.div_(sums).scatter_add_(1, index, torch.full_like(picked, -1))
                torch.mm(logits.to(weight), weight, out=gradient[rows])
        ctx.gradient = gradient
        return total if hidden.dtype == torch.float64 else total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        return ctx.gradient * gradients[0].to(ctx.gradient), None, None


def can_be_chunked(head: nn.Module) -> bool:
    """Whether a head is one product with a frozen weight, with nothing hooked to it: what `head_loss` stands for."""
    is_plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
    return is_plain and not (head._forward_hooks or head._forward_pre_hooks)


def head_loss(
    hidden: Float[Tensor, "targets d"], weight: Float[Tensor, "vocabulary d"], labels: Int64[Tensor, "targets"]
) -> Float[Tensor, ""]:
    """Σ -log softmax(hidden·weightᵀ)[label], in float32 or better; differentiable once, in ``hidden`` alone."""
    return _HeadLoss.apply(hidden, weight, labels)
