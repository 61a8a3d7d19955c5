"""Whether an answer of the host's is right: compared with what the enclave computed, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from veiltune.errors import IntegrityError


def require_right(what: str, excess: float) -> None:
    """End the session if an answer is wrong.

    Args:
        what: which answer.
        excess: its error, in units of what rounding can explain.

    Raises:
        IntegrityError: it is above 1.
    """
    if not excess <= 1:
        raise IntegrityError(
            f"the host's {what} is not what it was asked for: {excess:.3g} times the error that rounding allows",
            hint="leave this host; the last checkpoint is whole (--resume), but may hold what was false before and not seen",
        )


Allowed = Callable[[str, Tensor], float]
"""By quantity (of `privacy.bounds.error_bound`) and right value: the share of its size that rounding may change."""


def require_close_rows(
    what: str, got: Tensor | None, right: Tensor, allowed: Allowed, *, keep: Tensor | None = None
) -> None:
    """Compare states (…, d), row by row relative to each row's norm.

    Args:
        what: which answer.
        got: the host's.
        right: computed here.
        allowed: how far they may be apart.
        keep: (batch, past + seq), what is no padding, of states (batch, seq, d); ``None``: everything.

    Raises:
        IntegrityError: a row is wrong, or the shape is.
    """
    got, right = (_at_real_tokens(value, keep) for value in (_alike(what, got, right), right))
    require_right(what, _largest((got - right).norm(dim=-1), allowed("logits", right) * right.norm(dim=-1)))


def require_close(
    what: str, got: Tensor | None, right: Tensor, allowed: Allowed, *, keep: Tensor | None = None
) -> None:
    """Compare gradients, relative to the largest entry; otherwise as `require_close_rows`.

    Raises:
        IntegrityError: an entry is wrong, or the shape is.
    """
    got, right = (_at_real_tokens(value, keep) for value in (_alike(what, got, right), right))
    if right.numel():
        require_right(what, _largest((got - right).abs(), allowed("gradients", right) * right.abs().max()))


def _alike(what: str, got: Tensor | None, right: Tensor) -> Tensor:
    if got is None or got.shape != right.shape:
        require_right(f"shape of the {what}", math.inf)
        raise AssertionError("an infinite excess is refused")
    return got.to(right)


def _at_real_tokens(states: Tensor, keep: Tensor | None) -> Tensor:
    """What is computed for padding is nobody's business."""
    return states if keep is None else states[keep[:, -states.shape[1] :].to(states.device)]


def _largest(error: Tensor, allowed: Tensor) -> float:
    """The largest error in units of what is allowed; NaN counts as ∞, 0 of 0 as 0."""
    ratio = error / (allowed + torch.finfo(error.dtype).tiny)
    return float(torch.where(ratio.isfinite(), ratio, torch.inf).max()) if ratio.numel() else 0.0
