"""How far a protected pass may be from the plain one: c·κ·eps, from a probabilistic analysis of rounding errors.

*Reference*: Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41 (2019).
"""

from __future__ import annotations

import math
from typing import Final

from veiltune.errors import ConfigError, nearest

_SPREAD: Final = 2.0
"""Largest errors and largest entries are single draws. Over 160 passes (four families, two precisions, fresh keys each) the
error was 0.1 to 1.3 of the bound without this factor."""


def product_bound(dim: int, condition_number: float, eps: float) -> float:
    """How far (X·R)·(R⁻¹·W) may be from X·W, as a share of the largest entry of X·W: √(5·d)/2 · κ · eps.

    *Bound*: one rounding errs by at most u = eps/2 (eps is ``torch.finfo(dtype).eps``). Errors being independent with
    mean zero, an inner product of length d errs by λ·√d·u relative to its factors' norms, except with probability
    2·exp(-λ²/2) (Higham and Mary, SIAM J. Sci. Comput. 41 (2019), Theorem 3.1). At most five such stages occur: R with
    its inverse, X·R, R⁻¹·W, their product, and the plain X·W; in quadrature, √5·√d·u. An error in X·R reaches the
    result through R⁻¹, which grows it by at most ‖R‖·‖R⁻¹‖ = κ. Over N entries λ is about √(2·ln N), and so is the
    ratio of the largest of N Gaussian-like entries to the typical one: relative to the largest the two cancel.
    """
    return math.sqrt(5 * dim) / 2 * condition_number * eps


def error_bound(quantity: str, product: float, *, products: int, largest_logit: float = 1, loss: float = 1) -> float:
    """A first-order bound on the relative error of a whole protected pass; it is some c·κ·eps, as ``product`` is.

    Args:
        quantity: ``logits`` (relative to the largest), ``loss``, or ``gradients`` (each to its largest entry).
        product: β, the bound of one protected product: :func:`product_bound` at the widest and worst key.
        products: P, how many stand one behind the other: four a block (attention in and out, MLP in and out), and two
            for a matrix that takes the place of a norm's gain (Gemma's sandwich norms in a rotated stream).
        largest_logit: the largest |logit| met.
        loss: the plain loss.

    *Bound*: a product disturbs the residual stream by at most β of its size, since a branch does not exceed the stream;
    norms undo changes of scale; P independent disturbances add in quadrature: β·√P for the logits, and twice that for the
    spread between one largest entry and another, on which the ratio depends. Cross-entropy moves by at most 2·max|Δlogit|.
    A gradient is a product of a state (off by β·√P) and a backward signal that meets the same products again (β·√(2·P))
    and starts at a softmax whose entries move by 2·|Δlogit| of themselves. The network's own sensitivity is taken to be
    of order one: if it amplifies the rounding errors of its plain form, it does these.

    Raises:
        ConfigError: an unknown ``quantity``.
    """
    factors = {"logits": 1.0, "loss": 2 * largest_logit / loss, "gradients": 1 + math.sqrt(2) + 2 * largest_logit}
    if quantity not in factors:
        raise ConfigError(f"no error bound for {quantity!r}", hint=nearest(quantity, factors))
    return _SPREAD * factors[quantity] * math.sqrt(products) * product
