"""Error feedback: what rounding lost of a stream of gradients is added to those that follow.

*Reference.* Seide et al. (Interspeech 2014); Karimireddy et al. (arXiv 1901.09847). The residual is ours: see `ErrorFeedback`.
"""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from veiltune.privacy.quantisation import WireCodec


class ErrorFeedback:
    """Encodes a stream of gradients so that what rounding loses of one tensor is made up for by the next.

    The tensors of a stream belong to other examples of other lengths, so what one token lost means nothing to the token that
    takes its place later. The receiver makes of them a sum over tokens, Σ_t J_tᵀ·g_t. Let J_t = J + D_t, J common to all tokens
    and examples. Then the losses e_t cost Jᵀ·Σ_t e_t, which adds up from step to step, and is a bias where rounding drops the
    same small channels each time; and Σ_t D_tᵀ·e_t, which averages out and which no delayed correction can reach. So the
    residual is one vector, r = Σ_t e_t, and the next tensor carries it in proportion to its rows: g_t + r·|g_t|₁ / Σ|g|₁. Rows
    of zeros (padding) stay zero, and no row changes by more than |r|₁ / Σ|g|₁ of its own size.

    *Bound.* After any number of tensors the sum over all rows sent is the sum over all rows given less ``residual``, which is
    what the last tensor, of n rows, lost: at most n·s·√d / 2 in norm, s = max|y| / Q (stochastic: twice that).
    """

    def __init__(self, codec: WireCodec) -> None:
        self.codec: Final = codec
        self.residual: Tensor | None = None
        """What is still owed, (d,) in float32; None before the first tensor. A lost residual costs one correction."""

    def encode(self, gradient: Float[Tensor, "*batch d"], *, starts: bool = True) -> UInt8[Tensor, " n"]:
        """The bytes of ``gradient`` plus what is owed; arguments and errors as for `WireCodec.encode`.

        Raises:
            ValueError: the width differs from that of earlier gradients.
        """
        if self.codec.bits == 32:
            return self.codec.encode(gradient, starts=starts)
        given = gradient.detach().float()
        owed = given.new_zeros(given.shape[-1]) if self.residual is None else self.residual
        if owed.shape != given.shape[-1:]:
            raise ValueError(f"gradients of width {given.shape[-1]} after a residual of width {len(owed)}")
        sizes = given.abs().sum(-1, keepdim=True)
        share = sizes / sizes.sum().clamp_min(torch.finfo(torch.float32).tiny)
        payload = self.codec.encode((given + share * owed).to(gradient.dtype), starts=starts)
        lost = (given - self.codec.decode(payload).float()).reshape(-1, len(owed)).sum(0)
        self.residual = owed + lost
        return payload
