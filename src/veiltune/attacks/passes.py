"""What the attacks have in common when they read a view: the passes in it, and the states they carry.

*States at the cut* come from `TrunkForward` messages, decoded as the agreed wire says; *masked first states* from the first
operation of each pass under `obfuscatune`, or from each forward under `veil`. Passes with a KV cache are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veiltune.attacks.view import View
from veiltune.errors import DataError
from veiltune.privacy.quantisation import WireCodec, WireOptions
from veiltune.transport.messages import Message, SegmentForward, TrunkForward, VeiledForward

FIRST_SEGMENT = 0


@dataclass(frozen=True)
class States:
    """Wanted rows of one pass, right-padded, with the length of each."""

    number: int
    hidden: Float[Tensor, "rows seq d"]
    lengths: Sequence[int]

    def sequences(self) -> list[Float[Tensor, "_ d"]]:
        """Each row without its padding."""
        return [row[:length] for row, length in zip(self.hidden, self.lengths, strict=True)]


@dataclass(frozen=True)
class Agreement:
    """What owner and provider agreed on, of which an attack has use."""

    bottom_layers: int
    wire: WireOptions

    def rounded(self, states: Float[Tensor, "n seq d"], *, starts: bool) -> Float[Tensor, "n seq d"]:
        """States as the wire would deliver them; as they are, where it rounds at random."""
        if self.wire.activation_bits == 32 or self.wire.stochastic:
            return states
        codec = WireCodec.for_activations(self.wire)
        return codec.decode(codec.encode(states, starts=starts))


def begins_pass(message: Message) -> bool:
    """Whether a message is no forward at all, or the first one of a pass without a KV cache: all that these attacks use."""
    if isinstance(message, SegmentForward):
        return message.segment == FIRST_SEGMENT and message.cache_id == 0
    return not isinstance(message, TrunkForward | VeiledForward) or message.cache_id == 0


def agreement_of(view: View) -> Agreement:
    """From the owner's request, which both sides see.

    Raises:
        DataError: the view has none.
    """
    requests = view.messages("SplitRequest")
    if not requests:
        raise DataError("the transcript holds no agreement between owner and provider", hint="record a whole session")
    terms = requests[0]["terms"]
    return Agreement(int(terms["cut.bottom_layers"]), WireOptions.model_validate(terms["wire"]))


def smashed_states(view: View) -> list[States]:
    """States at the cut, pass by pass."""
    codec = WireCodec.for_activations(agreement_of(view).wire)
    found: list[States] = []
    for seen in view.messages("TrunkForward"):
        if view.targets is not None and not view.targets.get(seen.number):
            continue
        hidden = codec.decode(seen["hidden"]).float()
        rows = view.rows(seen.number, len(hidden))
        lengths = lengths_of(seen["attention_mask"], len(hidden), hidden.shape[1])
        found.append(States(seen.number, hidden[rows], [lengths[row] for row in rows]))
    return found


def masked_first_states(view: View) -> list[States]:
    """What stands for the first states of each pass at the host: X₀·R."""
    return _veiled(view) if view.rights.design == "veil" else _first_segments(view)


def _veiled(view: View) -> list[States]:
    found: list[States] = []
    for seen in view.messages("VeiledForward"):
        if view.targets is None or view.targets.get(seen.number):
            hidden = seen["hidden"].float()
            rows = view.rows(seen.number, len(hidden))
            lengths = lengths_of(seen["attention_mask"], len(hidden), hidden.shape[1])
            found.append(States(seen.number, hidden[rows], [lengths[row] for row in rows]))
    return found


def _first_segments(view: View) -> list[States]:
    masks = masks_of_segments(view)
    found: list[States] = []
    for seen in view.messages("SegmentForward"):
        if seen["segment"] != FIRST_SEGMENT or (view.targets is not None and not view.targets.get(seen.number)):
            continue
        hidden = seen["hidden"].float()
        rows = view.rows(seen.number, len(hidden))
        lengths = lengths_of(masks.get(seen.number), len(hidden), hidden.shape[1])
        found.append(States(seen.number, hidden[rows], [lengths[row] for row in rows]))
    return found


def masks_of_segments(view: View) -> dict[int, Any]:
    """The attention mask of each recorded segment's pass, by its message's number. Each session counts contexts anew."""
    masks: dict[int, Any] = {}
    contexts: dict[int, Any] = {}
    both = [*view.messages("PassContext"), *view.messages("SegmentForward")]
    for seen in sorted(both, key=lambda each: each.number):
        if seen.kind == "PassContext":
            contexts[seen["context_id"]] = seen["attention_mask"]
        else:
            masks[seen.number] = contexts.get(seen["context_id"])
    return masks


def lengths_of(mask: Any, rows: int, length: int) -> list[int]:
    """Tokens of each row, by a padding mask (batch, seq) or an attention mask (batch, 1, query, key), bool or additive."""
    if mask is None:
        return [length] * rows
    visible = mask if mask.dtype == torch.bool else (mask > -1 if mask.is_floating_point() else mask != 0)
    if visible.dim() == 4:
        visible = visible[:, 0].any(dim=1)
    lengths = visible.sum(1).tolist()
    return lengths if len(lengths) == rows else lengths * rows


def joined(passes: Sequence[States]) -> list[Float[Tensor, "_ d"]]:
    """Every sequence of every pass, in order."""
    return [sequence for states in passes for sequence in states.sequences()]
