"""Procrustes: the keys from masked weights and a public ancestor of the true ones, then the weights and the text.

*Symbols.* W true weights and W' an ancestor's, rows meeting the residual stream; W* = R⁻¹·W on the input side, W* = W·R on the
output side. For an orthogonal R the input side's estimate is R̂ = U·Vᵀ with U·S·Vᵀ = W'·W*ᵀ, linears that share a key side by
side; then Ŵ = R̂·W*. The output side is the same of transposes. Keys that are not orthogonal (told by the singular values,
which a rotation keeps) are solved for by least squares.

*Reference.* Schönemann, "A generalized solution of the orthogonal Procrustes problem" (1966). Published strength: weights to
0.4 / 4 / 20% at an ancestor of 1 / 10 / 50% distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from veiltune.attacks.anchors import FIRST_STATES, nearest_tokens
from veiltune.attacks.base import Attack, Auxiliary, EmbeddingTable, Knowledge, Reconstruction
from veiltune.attacks.passes import joined, masked_first_states
from veiltune.attacks.view import View
from veiltune.models.families import find_family
from veiltune.models.family import Family, Linear
from veiltune.models.skeleton import config_from_json

SAME_SPECTRUM = 0.75
"""Largest relative distance of two spectra that still tells a rotation: an ancestor at 50% is far nearer than that."""


@dataclass(frozen=True)
class Procrustes(Attack):
    """See the module. ``distance`` is that of the ancestor: ‖W' - W‖ / ‖W‖."""

    name: ClassVar[str] = "procrustes"
    summary: ClassVar[str] = "keys and weights from masked weights and a public ancestor"
    observer: ClassVar[str] = "host"
    against: ClassVar = {
        "obfuscatune": FIRST_STATES["obfuscatune"] | {"TrunkShard.tensors", "TrunkPlan.config"},
    }
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"public_ancestor", "embedding_table"})
    cost: ClassVar[str] = "a singular value decomposition of (d, d) for each key; a minute for thirty blocks"
    control: ClassVar[tuple[str, float]] = ("weight_cosine", 0.99)
    leaky_settings: ClassVar[Mapping[str, Any]] = {"distance": 0.0}

    distance: float = 0.1

    @torch.no_grad()
    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:  # noqa: ARG002
        """See `Attack.run`."""
        (plan,) = view.messages("TrunkPlan")[:1]
        config = config_from_json(plan["config"])
        family = find_family(config)
        masked = {n: v for shard in view.messages("TrunkShard") for n, v in shard["tensors"].items()}
        groups: dict[str, list[Linear]] = {}
        for linear in family.linears(config.num_hidden_layers):
            if f"{linear.path}.weight" in masked:
                groups.setdefault(linear.key, []).append(linear)
        ancestor = auxiliary.take("public_ancestor")
        weights: dict[str, Tensor] = {}
        keys: dict[str, Tensor] = {}
        for label, linears in groups.items():
            keys[label] = recover_key(_side_by_side(ancestor, linears, family), _side_by_side(masked, linears, family))
            for linear in linears:
                name = f"{linear.path}.weight"
                true = keys[label] @ _oriented(masked[name], linear, family).double()
                weights[name] = _oriented(true, linear, family).float().contiguous()
        return Reconstruction(tokens=self._tokens(view, auxiliary, keys), weights=weights)

    @staticmethod
    def _tokens(view: View, auxiliary: Auxiliary, keys: Mapping[str, Tensor]) -> list[list[int]]:
        """What follows: the first key unmasks the first states."""
        table: EmbeddingTable = auxiliary.take("embedding_table")
        sequences = joined(masked_first_states(view))
        if not sequences:
            return []
        positions = torch.cat([torch.arange(len(each)) for each in sequences])
        key = keys["block0.attention.in"]
        states = (torch.cat(sequences).double() @ torch.linalg.pinv(key)).float()
        tokens = nearest_tokens(states, positions, table, "normed")
        return [part.tolist() for part in tokens.split([len(each) for each in sequences])]


def _oriented(weight: Tensor, linear: Linear, family: Family) -> Float[Tensor, "rows columns"]:
    """A weight with the side that meets its key as rows, and back."""
    in_out = family.weights_in_out
    return weight if in_out == (linear.side == "input") else weight.T


def _side_by_side(tensors: Mapping[str, Tensor], linears: list[Linear], family: Family) -> Float[Tensor, "d columns"]:
    return torch.cat([_oriented(tensors[f"{each.path}.weight"], each, family) for each in linears], dim=1).double()


def recover_key(ancestor: Float[Tensor, "d n"], masked: Float[Tensor, "d n"]) -> Float[Tensor, "d d"]:
    """The matrix K for which K·masked is nearest to the ancestor: R on the input side, R⁻ᵀ on the output side."""
    ours, theirs = torch.linalg.svdvals(ancestor), torch.linalg.svdvals(masked)
    if float((ours - theirs).norm() / ours.norm()) > SAME_SPECTRUM:
        return ancestor @ torch.linalg.pinv(masked)
    u, _, vh = torch.linalg.svd(ancestor @ masked.T)
    return u @ vh
