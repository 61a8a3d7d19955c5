"""Distance correlation between what the owner's tokens are and what is sent, as a regulariser of training.

*Reference*: Székely, Rizzo and Bakirov, "Measuring and testing dependence by correlation of distances", Annals of
Statistics 35 (2007), §2.2; as a regulariser of split learning, Vepakomma et al., "NoPeek" (ICDM workshops, 2020).

*Symbols*: E the embedding output and H the smashed activations, a row a token; D the matrix of Euclidean distances
between the rows of one of them, and A (of E), B (of H) that matrix less its row and column means plus its total mean.
dCor(E, H) = ⟨A, B⟩/(‖A‖·‖B‖) with Frobenius norms: the *squared* form, estimated with the diagonals (V-statistic). It
lies in [0, 1], is 1 if H is a scaled and moved rotation of E, and does not change when either is moved, rotated or
scaled.

*Bound*: none on what an observer recovers. dCor is 0 in the limit of many rows only if the two are independent, but a
small value says little of how well a trained inverter does. Nor is its floor 0: independent rows give S/n with
S = mean(D_E)·mean(D_H)/(‖A‖·‖B‖/n²), which for widths far above the number of rows comes near 1. So compare it with
that of unprotected activations, not with 0.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal, final

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field, model_validator
from torch import Tensor

from veiltune.config import Section


class DecorrelationOptions(Section):
    """How much distance correlation weighs in the loss, and when: the loss is L_task + α(step)·dCor(E, H)."""

    alpha: float = Field(default=0.0, ge=0, description="weight of the distance correlation in the loss; 0: off")
    schedule: Literal["constant", "linear"] = Field(
        default="constant", description="linear: the weight grows evenly over the first warmup_steps"
    )
    warmup_steps: int = Field(default=0, ge=0, description="of schedule = 'linear'")
    samples: int = Field(
        default=256, ge=2, le=4096, description="tokens a micro-batch it is estimated from; memory grows as the square"
    )

    @model_validator(mode="after")
    def _check_warmup(self) -> DecorrelationOptions:
        if (self.schedule == "linear") != (self.warmup_steps > 0):
            raise ValueError(
                "warmup_steps above 0 belongs to schedule = 'linear', and to it alone; give both or neither"
            )
        return self

    def alpha_at(self, step: int) -> float:
        """α at ``step``, counted from 0. A linear schedule starts at alpha/warmup_steps: no step goes unprotected."""
        return self.alpha if self.schedule == "constant" else self.alpha * min(1.0, (step + 1) / self.warmup_steps)


def distance_correlation(x: Float[Tensor, "n p"], y: Float[Tensor, "n q"]) -> Float[Tensor, ""]:
    """The distance correlation of paired rows, squared form, in float32 or better; memory for a few n x n matrices.

    Differentiable once, with finite gradients throughout (rows that coincide repel in no direction, so their distance
    has the gradient 0). It is 0, with gradient 0, where a side has fewer than two distinct rows: that includes rows
    that spread by less than tiny/eps of their dtype (1e-31 in float32), or less than tiny (1e-38) of the largest entry.
    What is not finite gives NaN.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    if len(x) < 2:
        return x[:0].sum() + y[:0].sum()  # 0, and still a function of both
    A, B = _centred_distances(x), _centred_distances(y)
    norms = A.square().sum() * B.square().sum()
    return ((A * B).sum() / norms.where(norms != 0, 1.0).sqrt()).clamp(0.0, 1.0)


def _centred_distances(rows: Float[Tensor, "n p"]) -> Float[Tensor, "n n"]:
    """The double-centred matrix of distances, up to a scale."""
    n = len(rows)
    first, second = torch.triu_indices(n, n, offset=1, device=rows.device)
    # From differences, not from a Gram matrix: rows that nearly coincide keep their distance's leading digits.
    condensed = torch.nn.functional.pdist(_standardised(rows))
    half = condensed.new_zeros(n, n).index_put((first, second), condensed)
    D = half + half.T
    means = D.mean(0)
    return D - means - means.unsqueeze(1) + means.mean()


def _standardised(rows: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
    """Rows scaled to spread by about 1, so that no square leaves the dtype's range; all 0 if they are equal.

    The scale counts as a constant in the gradient, which is exact: dCor does not depend on it.
    """
    info = torch.finfo(rows.dtype)
    with torch.no_grad():
        size = rows.abs().amax().clamp_min(info.tiny)
        spread = (rows / size - rows[0] / size).abs().amax()  # of the size: what all rows share may be far larger
        scale = (size * spread).clamp_max(info.max)
        negligible = (scale < info.tiny / info.eps) | (spread < info.tiny)  # neither, if anything is NaN
        scale = scale.where(~negligible, math.inf)
    return rows / scale


def sample_rows(mask: Shaped[Tensor, "..."], limit: int, generator: torch.Generator) -> Int[Tensor, " rows"]:
    """At most ``limit`` places where ``mask`` is not 0, drawn without replacement: sorted indices of the flat mask.

    Args:
        mask: 0 or False where there is nothing to sample (padding).
        limit: how many to draw; fewer places than that are all taken, and nothing is drawn.
        generator: on the CPU, so that every device samples alike.

    Raises:
        ValueError: ``limit`` is below 1.
    """
    if limit < 1:
        raise ValueError(f"at least one row must be sampled, got a limit of {limit}")
    places = mask.reshape(-1).nonzero().squeeze(1)
    if len(places) > limit:
        drawn = torch.randperm(len(places), generator=generator)[:limit].sort().values
        places = places[drawn.to(places.device)]
    return places


@final
class Decorrelation:
    """The regulariser of one training run: α(step)·dCor(E, H) of a sample of the tokens that are not padding.

    Which tokens are sampled follows from the seed, the step and the micro-batch's place in it, so that a resumed run
    samples as one that was never interrupted. The sample is no secret.

    Args:
        options: weight, schedule and sample size.
        seed: of the sampling.

    Attributes:
        step: the step that is being computed, from 0.
    """

    def __init__(self, options: DecorrelationOptions, seed: int) -> None:
        self.options = options
        self.step = 0
        self._seed = seed
        self._drawn = 0  # micro-batches of this step so far
        self._last: Tensor | None = None

    @property
    def last(self) -> float | None:
        """The dCor last measured, without its weight; None before the first time (and always, where α is 0)."""
        return None if self._last is None else float(self._last)

    def advance(self) -> None:
        """The step is complete: all its micro-batches have had their penalty."""
        self.start_at(self.step + 1)

    def start_at(self, step: int) -> None:
        """Go to the beginning of ``step``, as a resumed run does."""
        self.step, self._drawn = step, 0

    def penalty(
        self,
        embeddings: Float[Tensor, "batch seq d"],
        hidden: Float[Tensor, "batch seq h"],
        attention_mask: Shaped[Tensor, "batch seq"],
    ) -> Float[Tensor, ""]:
        """What to add to a micro-batch's mean loss, before that is weighted for accumulation.

        Gradients reach whatever both states depend on; detach the embeddings to leave a trained embedding out.

        Args:
            embeddings: E, what the first block receives.
            hidden: H, what is sent, before it is quantised.
            attention_mask: 0 where there is padding.
        """
        alpha = self.options.alpha_at(self.step)
        if alpha == 0:
            return hidden.new_zeros(())  # nothing is computed, and a loss plus 0 is the same to the last bit
        rows = sample_rows(attention_mask, self.options.samples, self._generator()).to(hidden.device)
        correlation = distance_correlation(embeddings.flatten(0, 1)[rows], hidden.flatten(0, 1)[rows])
        self._last = correlation.detach()
        return alpha * correlation

    def _generator(self) -> torch.Generator:
        label = f"decorrelation/{self._seed}/{self.step}/{self._drawn}"
        self._drawn += 1
        digest = hashlib.sha256(label.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
