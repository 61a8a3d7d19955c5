"""Blind source separation: the plain basis from masked states alone, if its coordinates were independent and not Gaussian.

*Symbols.* Y = S·R the masked states of many steps, S the plain ones. Independent component analysis finds the rotation of
whitened Y whose coordinates are least Gaussian. If the coordinates of S were independent, that would be S up to order, sign and
scale, with no knowledge beside Y. ``rows`` of Y are used: what comes out as a function of them says after how many steps a key
should be renewed. Of Y the ``components`` directions of greatest variance are separated: it takes some ten rows for each before
true sources are told from accidents of the sample (with Laplace sources 0.64 at 8 rows each, 0.94 at 16, 0.22 at 7 of 576).

*Controls.* Leaky: that many independent Laplace sources, turned into d channels, as many rows as the transcript has; so it
says what the algorithm does with as much material where its premise holds. (Masked and plain states give the same answer: the
algorithm whitens and turns, so a key taken away changes nothing.)

*Reference.* Hyvärinen, "Fast and robust fixed-point algorithms for independent component analysis" (1999), as in scikit-learn.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from veiltune.attacks.base import Attack, Auxiliary, Knowledge, Reconstruction
from veiltune.attacks.passes import FIRST_STATES, every_row, joined, masked_first_states
from veiltune.attacks.view import View
from veiltune.study_terms import Knows

TOLERANCE = 1e-3


@dataclass(frozen=True)
class IndependentComponents(Attack):
    """See the module. ``rows`` masked states, of as many steps as it takes; at most ``turns`` iterations."""

    name: ClassVar[str] = "ica"
    summary: ClassVar[str] = "independent components of masked states of many steps"
    observer: ClassVar[str] = "host"
    against: ClassVar = FIRST_STATES
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset()
    knows: ClassVar[Knows] = "nothing"
    cost: ClassVar[str] = "turns x (rows, d) by (d, d) products; minutes for thousands of rows at d = 576"
    control: ClassVar[tuple[str, float]] = ("basis_correlation", 0.6)

    rows: int = 4096
    components: int = 128
    turns: int = 200

    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:  # noqa: ARG002
        """See `Attack.run`."""
        seen = torch.cat(joined(masked_first_states(every_row(view))))[: self.rows]
        return Reconstruction(sources=self._separate(seen, joined(masked_first_states(view)), rng))

    def leaky(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:  # noqa: ARG002
        """Sources for which the premise holds, in the place of the states: as many, of the same lengths."""
        count = min(self.rows, sum(map(len, joined(masked_first_states(every_row(view))))))
        wanted = joined(masked_first_states(view))
        dim, count_sources = wanted[0].shape[1], min(self.components, wanted[0].shape[1])
        total = max(count, sum(map(len, wanted)))
        uniform = torch.rand((total, count_sources), generator=rng) - 0.5
        sources = -uniform.sign() * (1 - 2 * uniform.abs()).clamp_min(1e-12).log()
        key = torch.linalg.qr(torch.randn((dim, dim), generator=rng)).Q[:count_sources]
        truth = list(sources[: sum(map(len, wanted))].split([len(each) for each in wanted]))
        found = self._separate(sources[:count] @ key, [each @ key for each in truth], rng)
        return Reconstruction(sources=found, source_truth=truth)

    def _separate(
        self, seen: Float[Tensor, "n d"], wanted: Sequence[Float[Tensor, "_ d"]], rng: torch.Generator
    ) -> list[Float[Tensor, "_ m"]]:
        from sklearn.decomposition import FastICA
        from sklearn.exceptions import ConvergenceWarning

        seed = int(torch.randint(1 << 31, (1,), generator=rng))
        rank = int(torch.linalg.matrix_rank((seen - seen.mean(0)).double(), rtol=1e-5))
        count = min(rank, self.components)
        model: Any = FastICA(count, whiten="unit-variance", max_iter=self.turns, tol=TOLERANCE, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # what it has come to by then is scored all the same
            model.fit(seen.double().numpy())
        return [torch.from_numpy(model.transform(each.double().numpy())).float() for each in wanted]
