"""Procrustes: the keys from masked weights and a public ancestor of the true ones, then the weights and the text.

*Symbols.* W true weights and W' an ancestor's, rows meeting the residual stream; W* = R⁻¹·W on the input side, W* = W·R on the
output side. For an orthogonal R the input side's estimate is R̂ = U·Vᵀ with U·S·Vᵀ = W'·W*ᵀ, linears that share a key side by
side; then Ŵ = R̂·W*. The output side is the same of transposes. Keys that are not orthogonal (told by the singular values,
which a rotation keeps) are solved for by least squares.

Under `veil` weights are disguised on both sides: see `attacks.stream` for the key, `attacks.inside` for the rest. They are
scored as the host would run them without secrets: norms and centring folded in.

*Reference.* Schönemann, "A generalized solution of the orthogonal Procrustes problem" (1966). Published strength: weights to
0.4 / 4 / 20% at an ancestor of 1 / 10 / 50% distance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from veiltune.attacks.base import Attack, Auxiliary, EmbeddingTable, Knowledge, Reconstruction
from veiltune.attacks.nearest import nearest_tokens
from veiltune.attacks.passes import FIRST_STATES, joined, masked_first_states, masked_weights
from veiltune.attacks.veiled import TRUNK, read_first_states, steal_trunk
from veiltune.attacks.view import View
from veiltune.models.ancestry import facing_key, side_by_side
from veiltune.models.families import find_family
from veiltune.models.family import Family, Linear
from veiltune.models.skeleton import config_from_json
from veiltune.privacy.alignment import recover_key
from veiltune.study_terms import Knows


def recovered_keys(
    masked: Mapping[str, Tensor], ancestor: Mapping[str, Tensor], family: Family, linears: Iterable[Linear]
) -> dict[str, Float[Tensor, "d d"]]:
    """The keys of those linears that the host holds, by label, in float64: linears that share one side by side."""
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        if f"{linear.path}.weight" in masked:
            groups.setdefault(linear.key, []).append(linear)
    return {
        label: recover_key(side_by_side(ancestor, members, family), side_by_side(masked, members, family))
        for label, members in groups.items()
    }


@dataclass(frozen=True)
class Procrustes(Attack):
    """See the module. ``distance`` is that of the ancestor: ‖W' - W‖ / ‖W‖."""

    name: ClassVar[str] = "procrustes"
    summary: ClassVar[str] = "keys and weights from masked weights and a public ancestor"
    observer: ClassVar[str] = "host"
    against: ClassVar = {
        "obfuscatune": FIRST_STATES["obfuscatune"] | {"TrunkShard.tensors", "TrunkPlan.config"},
        "veil": TRUNK,
    }
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"public_ancestor", "ancestor_model", "embedding_table"})
    knows: ClassVar[Knows] = "public_ancestor"
    cost: ClassVar[str] = "a singular value decomposition of (d, d) for each key; a minute for thirty blocks"
    control: ClassVar[tuple[str, float]] = ("weight_cosine", 0.99)
    leaky_settings: ClassVar[Mapping[str, Any]] = {"distance": 0.0}

    distance: float = 0.1

    def takes(self, design: str, layers: int) -> frozenset[Knowledge]:
        """See `Attack.takes`: whole blocks of the ancestor are run only where there are some before the host's states."""
        return self.auxiliary if design == "veil" and layers else self.auxiliary - {"ancestor_model"}

    @torch.no_grad()
    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """See `Attack.run`."""
        if view.rights.design == "veil":
            stolen = steal_trunk(view, auxiliary.take("public_ancestor"))
            tokens, states = read_first_states(view, auxiliary, stolen, rng)
            return Reconstruction(tokens=tokens, states=states, weights=stolen.weights)
        (plan,) = view.messages("TrunkPlan")[:1]
        config = config_from_json(plan["config"])
        family = find_family(config)
        linears = list(family.linears(config.num_hidden_layers))
        masked = masked_weights(view)
        keys = recovered_keys(masked, auxiliary.take("public_ancestor"), family, linears)
        weights: dict[str, Tensor] = {}
        for linear in linears:
            name = f"{linear.path}.weight"
            if name in masked:
                true = keys[linear.key] @ facing_key(masked[name], linear, family).double()
                weights[name] = facing_key(true, linear, family).float().contiguous()
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
