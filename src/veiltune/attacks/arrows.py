"""ArrowMatch: which hidden unit and which head is which, by the directions of their weights beside a public ancestor's.

*Symbols.* As in `attacks.folded`. A permutation and positive scales leave the direction of each row. A rotation of the stream
does not, but it is one for all of them, and `attacks.stream` finds it first.

*Scored.* `unit_accuracy`: the share of hidden units put where the most alike true one is; error and cosine of weights.

*Reference.* Wang et al., "Game of Arrows: On the (In-)Security of Weight Obfuscation" (USENIX Security 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from veiltune.attacks.base import Attack, Auxiliary, Knowledge, Reconstruction
from veiltune.attacks.veiled import TRUNK, steal_trunk
from veiltune.attacks.view import View
from veiltune.study_terms import Knows, Phase


@dataclass(frozen=True)
class ArrowMatch(Attack):
    """See the module. ``distance`` is that of the ancestor: ‖W' - W‖ / ‖W‖."""

    name: ClassVar[str] = "arrow_match"
    summary: ClassVar[str] = "order and scales of hidden units by direction, beside a public ancestor"
    observer: ClassVar[str] = "host"
    against: ClassVar = {"veil": TRUNK}
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"public_ancestor"})
    knows: ClassVar[Knows] = "public_ancestor"
    phases: ClassVar[frozenset[Phase]] = frozenset({"tuning"})
    cost: ClassVar[str] = "a product of all units with all units a block, and an assignment; a minute for thirty blocks"
    control: ClassVar[tuple[str, float]] = ("unit_accuracy", 0.99)
    leaky_settings: ClassVar[Mapping[str, Any]] = {"distance": 0.0}

    distance: float = 0.1

    @torch.no_grad()
    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:  # noqa: ARG002
        """See `Attack.run`."""
        stolen = steal_trunk(view, auxiliary.take("public_ancestor"))
        mlp = (*stolen.shape.family.mlp.inputs, stolen.shape.family.mlp.output)
        width = int(stolen.shape.config.hidden_size)
        units = {
            name: value.T if value.shape[0] == width else value  # one row a unit
            for name, value in stolen.weights.items()
            if name.removesuffix(".weight").endswith(mlp)
        }
        return Reconstruction(units=units)
