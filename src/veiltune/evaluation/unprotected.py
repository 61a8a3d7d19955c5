"""The leaky control's view: the messages of a recorded view as they would be with protection off.

The same texts and passes, through the model as it was before tuning: all states at the cut in full precision, first states and
weights under no key, gradients at the cut of the true labels, and what `veiltune.evaluation.replaced` puts in their place for
gradients of factors and emulators. Everything else is as recorded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from veiltune.attacks import EmbeddingTable, View
from veiltune.config import CutConfig
from veiltune.evaluation.hosted import trunk_weights
from veiltune.evaluation.replaced import Replaced
from veiltune.evaluation.returned import PlainReturns
from veiltune.evaluation.truth import TruePass
from veiltune.models.bottom import Bottom
from veiltune.models.rotated.rotation import centred
from veiltune.privacy.quantisation import WireCodec, WireOptions
from veiltune.transport.messages import (
    Message,
    SegmentForward,
    SplitRequest,
    TrunkBackward,
    TrunkForward,
    TrunkOutput,
    TrunkShard,
    VeiledForward,
)


def unprotected(
    view: View,
    model: nn.Module,
    passes: Mapping[int, TruePass],
    cut: CutConfig,
    enclave_layers: int = 0,
    *,
    beside: Mapping[int, TruePass] | None = None,
) -> View:
    """The view without protection.

    Args:
        view: of a run.
        model: the plain causal language model.
        passes: the true texts, by the number of the message that begins their pass.
        cut: where the model is cut, if it is.
        enclave_layers: blocks in the enclave before the host's first.
        beside: the true texts of other phases' passes. An attack that counts all states at a host counts theirs too.
    """
    table = EmbeddingTable(model)
    bottom = Bottom(model, cut.bottom_layers if view.rights.sees("TrunkForward") else 0)
    weights = cache(lambda: trunk_weights(model, view.rights.design))
    before = Bottom(model, enclave_layers)
    plain_wire = WireOptions()
    codec = WireCodec.for_activations(plain_wire)
    returns = (
        PlainReturns(model, cut.top_layers, passes, view.targets) if "TrunkBackward.gradient" in view.reads else None
    )
    replaced = Replaced(view, model, passes, codec)

    @torch.no_grad()
    def change(number: int, message: Message) -> Message:
        if isinstance(message, SplitRequest):
            return dataclasses.replace(message, terms={**message.terms, "wire": plain_wire.model_dump(mode="json")})
        if isinstance(message, TrunkShard):
            return TrunkShard({name: weights()[name] for name in message.tensors})
        if isinstance(message, TrunkOutput | TrunkBackward) and returns:
            return returns.answered(message, codec)
        true = passes.get(number)
        if isinstance(message, SegmentForward | VeiledForward):
            true = true or (beside or {}).get(number)
        if true is None:
            return replaced(number, message)
        if isinstance(message, TrunkForward):
            if returns:
                returns.begun(number, message.ticket)
            mask = None if bool(true.mask.all()) else true.mask.bool()
            states = codec.encode(bottom.states(true.ids, true.mask))
            return dataclasses.replace(message, hidden=states, attention_mask=mask, position_ids=None)
        if isinstance(message, SegmentForward | VeiledForward):
            message = dataclasses.replace(message, hidden=_first_states(table, before, true, view.rights.design))
        return message

    return view.altered(change)


def _first_states(table: EmbeddingTable, before: Bottom, true: TruePass, design: str) -> Tensor:
    if before.layers:
        states = before.states(true.ids, true.mask)
        return centred(states) if before.has_positions else states
    rows, length = true.ids.shape
    positions = torch.arange(length).repeat(rows)
    return table.states(true.ids.flatten(), positions, table.form(design)).view(rows, length, -1)
