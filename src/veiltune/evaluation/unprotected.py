"""The leaky control's view: the messages of a recorded view as they would be with protection off.

The same texts and passes, through the model as it was before tuning: states at the cut in full precision, first states and
weights under no key. Everything else is as recorded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veiltune.attacks import EmbeddingTable, View
from veiltune.evaluation.truth import TruePass
from veiltune.models.bottom import Bottom
from veiltune.privacy.quantisation import WireCodec, WireOptions
from veiltune.transport.messages import (
    Message,
    SegmentForward,
    SplitRequest,
    TrunkForward,
    TrunkShard,
    VeiledForward,
)


def unprotected(view: View, model: nn.Module, passes: Mapping[int, TruePass], bottom_layers: int) -> View:
    """The view without protection.

    Args:
        view: of a run.
        model: the plain causal language model.
        passes: the true texts, by the number of the message that begins their pass.
        bottom_layers: the owner's first blocks, where the model is cut.
    """
    parameters: dict[str, Tensor] = {name: value.detach() for name, value in model.named_parameters()}
    table = EmbeddingTable(model)
    bottom = Bottom(model, bottom_layers if view.rights.sees("TrunkForward") else 0)
    plain_wire = WireOptions()
    codec = WireCodec.for_activations(plain_wire)

    @torch.no_grad()
    def change(number: int, message: Message) -> Message:
        if isinstance(message, SplitRequest):
            return dataclasses.replace(message, terms={**message.terms, "wire": plain_wire.model_dump(mode="json")})
        if isinstance(message, TrunkShard):
            return TrunkShard({name: parameters[name] for name in message.tensors})
        true = passes.get(number)
        if true is None:
            return message
        if isinstance(message, TrunkForward):
            return dataclasses.replace(message, hidden=codec.encode(bottom.states(true.ids, true.mask)))
        if isinstance(message, SegmentForward | VeiledForward):
            return dataclasses.replace(message, hidden=_first_states(table, true, view.rights.design))
        return message

    return view.altered(change)


def _first_states(table: EmbeddingTable, true: TruePass, design: str) -> Tensor:
    rows, length = true.ids.shape
    positions = torch.arange(length).repeat(rows)
    return table.states(true.ids.flatten(), positions, table.form(design)).view(rows, length, -1)
