"""Who holds which parameter under `veil`, by the depth of the cut, and what share of parameters and arithmetic is the enclave's.

What is counted is as in `models.accounting`. The host's weights are the plain ones under maps on both sides; a gain or bias of
the trunk's norms is folded into them, and its own numbers stay in the enclave, which maps LoRA factors with them. The stream is
turned on entering and on leaving, so the maskings cost 4·d² a token in all, and not 8·d² a block.
"""

from __future__ import annotations

import math
from typing import Any

from veiltune.errors import UserError
from veiltune.models.accounting import (
    Shares,
    TensorPlace,
    attention_widths,
    kinds_of,
    linear_shapes,
    stored_parameters,
)
from veiltune.models.cut import Cut
from veiltune.models.families import find_family
from veiltune.models.skeleton import empty_model


def veil_placement(config: Any, cut: Cut, *, inner: bool = True) -> list[TensorPlace]:
    """Every parameter of the plain model, in the model's order, and who holds it.

    Args:
        config: a `transformers` configuration.
        cut: which blocks are the trunk.
        inner: there are maps inside blocks; without them the host has input-side biases and QK-norm gains as they are.

    Raises:
        ModelError: no family covers the configuration.
    """
    model: Any = empty_model(config)
    family, kinds = find_family(config), kinds_of(model, config)
    bare = {f"{linear.path}.bias" for linear in family.linears(cut.num_layers) if linear.side == "input"}
    bare |= {f"{path}.weight" for _, path in family.exposed(cut.num_layers)}
    norms = tuple(f".{segment.norm}" for segment in family.segments)
    places: list[TensorPlace] = []
    for name, value in stored_parameters(model):
        folded = name.rpartition(".")[0].endswith(norms)
        on_host = cut.holds(family, name) == "trunk" and not folded
        is_masked = on_host and (inner or name not in bare)
        kind = kinds.get(name, "other")
        holder = "host" if on_host else "enclave"
        places.append(TensorPlace(name, tuple(value.shape), value.numel(), holder, is_masked, kind))
    return places


def veil_shares(config: Any, cut: Cut, batch: int, length: int, *, inner: bool = True) -> Shares:
    """The enclave's share of parameters and of forward FLOPs over ``batch`` sequences of ``length`` tokens.

    ``key_elements`` counts the stream's key alone: the maps inside blocks are used once, in folding.

    Raises:
        UserError: a batch or length below 1.
        ModelError: no family covers the configuration.
    """
    if batch < 1 or length < 1:
        raise UserError(
            f"cannot count a pass over {batch} x {length} tokens", hint="give a batch and a length of at least 1"
        )
    model: Any = empty_model(config)
    family, linears = find_family(config), linear_shapes(model, config)
    own = [(linear, shape) for linear, shape in linears if linear.block in cut.owner_layers]
    tokens = batch * length

    def products(part: list[Any]) -> int:
        return 2 * tokens * sum(math.prod(shape) for _, shape in part)

    def attention(part: list[Any]) -> int:
        return 4 * batch * length**2 * attention_widths(family, part)

    places = veil_placement(config, cut, inner=inner)
    head_flops = 2 * tokens * int(model.get_output_embeddings().weight.numel())
    key_elements = int(config.hidden_size) ** 2
    mask_flops = 2 * (2 * tokens * key_elements)
    return Shares(
        design="veil",
        placement=None,
        batch=batch,
        length=length,
        num_parameters=sum(place.num_parameters for place in places),
        enclave_parameters=sum(place.num_parameters for place in places if place.holder == "enclave"),
        clear_parameters=sum(p.num_parameters for p in places if p.holder == "host" and not p.is_masked),
        linear_flops=products(linears),
        attention_flops=attention(linears),
        head_flops=head_flops,
        mask_flops=mask_flops,
        enclave_flops=head_flops + mask_flops + products(own) + attention(own),
        key_elements=key_elements,
        lora_parameters_per_rank=sum(sum(shape) for _, shape in linears),
        crossings=2,
    )
