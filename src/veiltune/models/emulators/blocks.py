"""An emulator at work, on the owner's side: `transformers` blocks in the trunk's slots, frozen, differentiable in their input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.errors import ModelError, ProtocolError
from veiltune.models.cut import Cut, PassThrough, trunk_model
from veiltune.models.emulators.card import EmulatorCard, block_linears, check_tensors, fan
from veiltune.models.emulators.distil import Runner
from veiltune.models.emulators.linears import LowRankLinear, QuantisedLinear
from veiltune.models.families import find_family
from veiltune.models.family import Family
from veiltune.models.skeleton import assign_parameter, empty_model, require_complete


def emulator_blocks(
    config: Any,
    trunk: range,
    card: EmulatorCard,
    tensors: Mapping[str, Tensor],
    *,
    materialise: torch.dtype | None = None,
) -> dict[int, nn.Module]:
    """The blocks that the emulator kept, by slot. In the trunk's other slots states are to pass through.

    They are called as `transformers` calls its blocks. A block has its slot's number as ``layer_idx``, so a key-value cache
    and layer types work as in the whole model. Nothing requires a gradient; weights are not copied.

    Args:
        config: the whole model's `transformers` configuration.
        trunk: the slots of the agreed cut.
        card: what the emulator is.
        tensors: the card's tensors. Those it did not promise are refused.
        materialise: dequantise once, here, into this dtype, instead of at every product: dense weights stay in memory.

    Raises:
        ProtocolError: the card is of another cut, or the tensors are not those it promises.
    """
    if range(*card.trunk) != trunk:
        raise ProtocolError(
            f"the emulator is of the trunk {card.trunk[0]} to {card.trunk[1] - 1}, "
            f"the agreed one is {trunk.start} to {trunk.stop - 1}",
            hint="provider and owner must use the same cut",
        )
    check_tensors(config, card, tensors)
    family, model = find_family(config), empty_model(config)
    made: dict[int, nn.Module] = {}
    for slot in card.kept:
        _fill_block(model, family, slot, card, tensors, materialise)
        block = model.get_submodule(f"{family.blocks}.{slot}")
        require_complete(block)
        made[slot] = block
    return made


def install_emulator(
    model: nn.Module,
    trunk: range,
    card: EmulatorCard,
    tensors: Mapping[str, Tensor],
    *,
    materialise: torch.dtype | None = None,
) -> None:
    """Put an emulator into the trunk's slots of an owner's model, whose slots without a block hand states on.

    Call it after adapters were injected: PEFT would take the emulator's linears for some of the owner's. Arguments and errors
    are those of `emulator_blocks`, and:

    Raises:
        ModelError: a slot whose block was dropped still holds one.
    """
    config: Any = model.config
    slots = model.get_submodule(find_family(config).blocks)
    for slot in trunk:
        if slot not in card.kept and next(slots.get_submodule(str(slot)).parameters(), None) is not None:
            raise ModelError(
                f"slot {slot} is of the trunk and not of its emulator, but holds a block", hint="use the owner's model"
            )
    for slot, block in emulator_blocks(config, trunk, card, tensors, materialise=materialise).items():
        setattr(slots, str(slot), block)


def emulated_trunk(config: Any, cut: Cut, blocks: Mapping[int, nn.Module]) -> nn.Module:
    """A `trunk_model` with an emulator's blocks; in the other slots states pass through."""
    model = trunk_model(config, cut)
    slots = model.get_submodule(find_family(config).blocks)
    for slot in cut.trunk:
        setattr(slots, str(slot), blocks.get(slot) or PassThrough(slot))
    return model


def as_trunk(config: Any, cut: Cut, blocks: Mapping[int, nn.Module]) -> Runner:
    """What runs an emulator's blocks on hidden states, as the trunk would run; with position ids where they do not count."""
    decoder: Any = emulated_trunk(config, cut, blocks).get_submodule(find_family(config).decoder)

    def run(hidden: Tensor, mask: Tensor | None, position_ids: Tensor | None = None) -> Tensor:
        output = decoder(inputs_embeds=hidden, attention_mask=mask, position_ids=position_ids, use_cache=False)
        return output.last_hidden_state

    return run


def _fill_block(
    model: nn.Module,
    family: Family,
    slot: int,
    card: EmulatorCard,
    tensors: Mapping[str, Tensor],
    materialise: torch.dtype | None,
) -> None:
    """Replace the compressed linears of a block, and assign every other parameter."""
    plain = {name: value for name, value in tensors.items() if name.startswith(f"{family.blocks}.{slot}.")}
    for path in block_linears(family, slot):
        if f"{path}.down" in plain:
            down, up = plain.pop(f"{path}.down"), plain.pop(f"{path}.up")
            model.set_submodule(path, LowRankLinear(down, up, plain.pop(f"{path}.bias", None)))
        elif f"{path}.packed" in plain:
            packed, scales = plain.pop(f"{path}.packed"), plain.pop(f"{path}.scales")
            columns = fan(tuple(model.get_parameter(f"{path}.weight").shape), family)[1]
            shape = {"in_features": columns, "bits": card.bits, "group": card.group}
            if materialise is None:
                bias = plain.pop(f"{path}.bias", None)
                model.set_submodule(path, QuantisedLinear(packed, scales, bias, **shape))
            else:
                dense = QuantisedLinear(packed, scales, None, **shape).weight_in(materialise)
                plain[f"{path}.weight"] = dense.T.contiguous() if family.weights_in_out else dense
    for name, value in plain.items():
        assign_parameter(model, name, value)
