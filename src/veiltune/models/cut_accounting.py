"""Who holds which parameter where a model is cut, and what share of parameters and arithmetic falls to the data owner.

Everything comes from a configuration alone. What is counted as a FLOP, and what is not, is as in `models.accounting`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from veiltune.models.accounting import TensorPlace, attention_widths, kinds_of, linear_shapes, stored_parameters
from veiltune.models.cut import Cut
from veiltune.models.families import find_family
from veiltune.models.skeleton import empty_model


@dataclass(frozen=True)
class CutShares:
    """The owner's part of a cut model and of one forward pass.

    Attributes:
        cut: where.
        batch: sequences in the pass.
        length: tokens a sequence.
        num_parameters: of the plain model.
        owner_parameters: those of them that the owner holds: embeddings, bottom, top, final norm, head. It holds them in the
            clear, and got them from the provider.
        owner_flops: forward FLOPs of the owner: its blocks and the head.
        trunk_flops: forward FLOPs of the provider.
        lora_parameters_per_rank: numbers in the LoRA factors of the owner's linears at rank 1.
        crossings: messages with hidden states a forward pass, both ways.
        states_bytes: of one such message in float32.
    """

    cut: Cut
    batch: int
    length: int
    num_parameters: int
    owner_parameters: int
    owner_flops: int
    trunk_flops: int
    lora_parameters_per_rank: int
    crossings: int
    states_bytes: int

    @property
    def owner_share(self) -> float:
        """Share of the model's parameters that the owner holds, from 0 to 1."""
        return self.owner_parameters / self.num_parameters

    @property
    def flop_share(self) -> float:
        """Share of the forward FLOPs at the owner, from 0 to 1."""
        return self.owner_flops / (self.owner_flops + self.trunk_flops)


def cut_placement(config: Any, cut: Cut) -> list[TensorPlace]:
    """Every parameter of the plain model, in the model's order, and who holds it.

    Raises:
        ModelError: no family covers the configuration.
    """
    model: Any = empty_model(config)
    family, kinds = find_family(config), kinds_of(model, config)
    return [
        TensorPlace(
            name,
            tuple(value.shape),
            value.numel(),
            "owner" if cut.holds(family, name) == "owner" else "provider",
            is_masked=False,
            kind=kinds.get(name, "other"),
        )
        for name, value in stored_parameters(model)
    ]


def cut_shares(config: Any, cut: Cut, batch: int, length: int) -> CutShares:
    """The owner's share of parameters and of forward FLOPs over ``batch`` sequences of ``length`` tokens.

    Raises:
        ModelError: no family covers the configuration.
    """
    model: Any = empty_model(config)
    family, linears = find_family(config), linear_shapes(model, config)
    tokens = batch * length
    own = [(linear, shape) for linear, shape in linears if linear.block in cut.owner_layers]
    trunk = [(linear, shape) for linear, shape in linears if linear.block in cut.trunk]

    def flops(part: list[Any]) -> int:
        products = 2 * tokens * sum(math.prod(shape) for _, shape in part)
        return products + 4 * batch * length**2 * attention_widths(family, part)

    places = cut_placement(config, cut)
    return CutShares(
        cut=cut,
        batch=batch,
        length=length,
        num_parameters=sum(place.num_parameters for place in places),
        owner_parameters=sum(place.num_parameters for place in places if place.holder == "owner"),
        owner_flops=flops(own) + 2 * tokens * int(model.get_output_embeddings().weight.numel()),
        trunk_flops=flops(trunk),
        lora_parameters_per_rank=sum(sum(shape) for _, shape in own),
        crossings=2,
        states_bytes=4 * tokens * int(config.hidden_size),
    )
