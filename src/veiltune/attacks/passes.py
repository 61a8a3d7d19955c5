"""What the attacks have in common when they read a view: the passes in it, and the states they carry.

*States at the cut* come from `TrunkForward` messages, decoded as the agreed wire says; *masked first states* from the first
operation of each pass under `obfuscatune`, or from each forward under `veil`. With a KV cache a text crosses in pieces, the
prompt first and then token by token: these are put together, and stand under the number of the first.

Of a text not every position need have been sent (`veiltune.models.sent_positions`). The trunk is told where those stand that
were, so it knows how long each text is, and which of it is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune.attacks.base import UNKNOWN
from veiltune.attacks.view import Seen, View
from veiltune.errors import DataError, UserError
from veiltune.privacy.quantisation import WireCodec, WireOptions
from veiltune.transport.messages import Message, SegmentForward, TrunkForward, VeiledForward

FIRST_SEGMENT = 0
FIRST_STATES = {
    "obfuscatune": frozenset(
        {
            "SegmentForward.segment",
            "SegmentForward.cache_id",
            "SegmentForward.context_id",
            "SegmentForward.hidden",
            "PassContext.context_id",
            "PassContext.attention_mask",
        }
    ),
    "veil": frozenset(
        {"VeiledForward.cache_id", "VeiledForward.hidden", "VeiledForward.attention_mask", "TrunkPlan.settings"}
    ),
}
"""What carries first states, by design. Under `veil` they are those of single tokens only with enclave_layers = 0, which the
host is told."""


@dataclass(frozen=True)
class States:
    """Wanted rows of one pass, right-padded: how many states each has, and where in its text these stand, in order."""

    number: int
    hidden: Float[Tensor, "rows seq d"]
    lengths: Sequence[int]
    places: Sequence[Int[Tensor, " _"]]

    def sequences(self) -> list[Float[Tensor, "_ d"]]:
        """Each row without its padding."""
        return [row[:length] for row, length in zip(self.hidden, self.lengths, strict=True)]


@dataclass(frozen=True)
class Agreement:
    """What owner and provider agreed on, of which an attack has use.

    What crosses is ``quantised(projected(states))``: attacks compare in that space, whatever its width.
    """

    bottom_layers: int
    wire: WireOptions
    top_layers: int = 0

    def projected(self, states: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch k"]:
        """States before they are rounded; differentiable. Nothing is projected on today's wire."""
        return states

    def quantised(self, crossing: Float[Tensor, "n seq k"], *, starts: bool) -> Float[Tensor, "n seq k"]:
        """What the wire delivers of numbers that are to cross; those themselves, where it rounds at random."""
        if self.wire.activation_bits == 32 or self.wire.stochastic:
            return crossing
        codec = WireCodec.for_activations(self.wire)
        return codec.decode(codec.encode(crossing, starts=starts))

    def rounded(self, states: Float[Tensor, "n seq d"], *, starts: bool) -> Float[Tensor, "n seq k"]:
        """States as the wire would deliver them, but for what is drawn at random."""
        return self.quantised(self.projected(states), starts=starts)

    def sent(
        self, states: Float[Tensor, "n seq d"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n seq k"]:
        """One draw of what the wire delivers of whole sequences: for whoever learns from what crosses."""
        if not self.wire.stochastic:
            return self.rounded(states, starts=True)
        codec = WireCodec.for_activations(self.wire, generator=generator)
        return codec.decode(codec.encode(self.projected(states)))


def carries_first(message: Message) -> bool:
    """Whether a message is no forward at all, or the first one of a pass: all that these attacks use."""
    return not isinstance(message, SegmentForward) or message.segment == FIRST_SEGMENT


def is_cached(message: Message) -> bool:
    """Whether it is a forward with a KV cache: part of a generation."""
    return isinstance(message, SegmentForward | TrunkForward | VeiledForward) and message.cache_id != 0


def begins_pass(message: Message) -> bool:
    """Whether it is no forward at all, or the first one of a pass without a KV cache."""
    return carries_first(message) and not is_cached(message)


def whole_passes(view: View, kind: str) -> Iterator[list[Seen]]:
    """The first forwards of each pass that is asked for: one, or all those that went on with its KV cache.

    A generation begins with a new cache, with more than one token, or where the scorer says so. (One that begins with a single
    token, in another session under the same number, is taken for more of the last.)
    """
    pieces: list[Seen] = []
    for seen in view.messages(kind):
        if kind == "SegmentForward" and seen["segment"] != FIRST_SEGMENT:
            continue
        if pieces and _goes_on(view, pieces[0], seen):
            pieces.append(seen)
            continue
        if pieces and _is_asked(view, pieces[0]):
            yield pieces
        pieces = [seen]
    if pieces and _is_asked(view, pieces[0]):
        yield pieces


def _goes_on(view: View, first: Seen, seen: Seen) -> bool:
    if not seen["cache_id"] or seen["cache_id"] != first["cache_id"] or (view.targets or {}).get(seen.number):
        return False
    hidden = seen["hidden"]
    return (hidden if seen.kind != "TrunkForward" else _wire(view).decode(hidden)).shape[1] == 1


def _is_asked(view: View, seen: Seen) -> bool:
    return view.targets is None or bool(view.targets.get(seen.number))


def _wire(view: View) -> WireCodec:
    return WireCodec.for_activations(agreement_of(view).wire)


def _joined_states(view: View, pieces: Sequence[Seen], parts: Sequence[Tensor], mask: Any) -> States:
    """The rows that are asked for of one pass; one with a cache has no padding."""
    hidden = torch.cat([part.float() for part in parts], dim=1)
    rows = view.rows(pieces[0].number, len(hidden))
    lengths = lengths_of(None if pieces[0]["cache_id"] else mask, len(hidden), hidden.shape[1])
    told = [each["position_ids"] if each.kind == "TrunkForward" else None for each in pieces]
    places = places_of(told, [part.shape[1] for part in parts], len(hidden))
    chosen = [lengths[row] for row in rows]
    return States(pieces[0].number, hidden[rows], chosen, [places[r, :n] for r, n in zip(rows, chosen, strict=True)])


def places_of(told: Sequence[Any], widths: Sequence[int], rows: int) -> Int[Tensor, "rows total"]:
    """Where in their texts the states of a pass stand, which may have crossed in pieces.

    Args:
        told: position ids of each piece, (1 or rows, width); ``None``: they count on.
        widths: positions of each piece.
        rows: of the pass.
    """
    found: list[Tensor] = []
    for ids, width in zip(told, widths, strict=True):
        before = sum(part.shape[1] for part in found)
        counted = torch.arange(before, before + width)[None] if ids is None else ids.long().cpu()
        found.append(counted.expand(rows, width))
    return torch.cat(found, dim=1)


def agreement_of(view: View) -> Agreement:
    """From the owner's request, which both sides see.

    Raises:
        DataError: the view has none.
    """
    requests = view.messages("SplitRequest")
    if not requests:
        raise DataError("the transcript holds no agreement between owner and provider", hint="record a whole session")
    terms = requests[0]["terms"]
    wire = WireOptions.model_validate(terms["wire"])
    return Agreement(int(terms["cut.bottom_layers"]), wire, int(terms["cut.top_layers"]))


def smashed_states(view: View) -> list[States]:
    """States at the cut, pass by pass."""
    codec = _wire(view)
    return [
        _joined_states(view, pieces, [codec.decode(each["hidden"]) for each in pieces], pieces[0]["attention_mask"])
        for pieces in whole_passes(view, "TrunkForward")
    ]


@dataclass(frozen=True)
class Returned:
    """Wanted rows of a pass that had a backward: the trunk's output, and what the owner returned as its gradient."""

    number: int
    outputs: Float[Tensor, "rows seq d"]
    gradients: Float[Tensor, "rows seq d"]
    lengths: Sequence[int]


def returned_gradients(view: View) -> dict[int, Returned]:
    """Output and gradient of each pass that has both, by the number of its forward's message.

    A ticket names one forward of a session; sessions count anew, so an answer belongs to the last forward of its ticket.
    """
    wire = agreement_of(view).wire
    states, gradients = WireCodec.for_activations(wire), WireCodec.for_gradients(wire)
    kinds = ("TrunkForward", "TrunkOutput", "TrunkBackward")
    forwards: dict[int, Any] = {}
    outputs: dict[int, Tensor] = {}
    found: dict[int, Returned] = {}
    for seen in sorted((each for kind in kinds for each in view.messages(kind)), key=lambda each: each.number):
        ticket = seen["ticket"]
        if seen.kind == "TrunkForward":
            forwards[ticket] = seen
        elif ticket not in forwards or (view.targets is not None and not view.targets.get(forwards[ticket].number)):
            continue
        elif seen.kind == "TrunkOutput":
            outputs[forwards[ticket].number] = seen["hidden"]
        elif forwards[ticket].number in outputs:
            forward = forwards[ticket]
            whole = states.decode(outputs.pop(forward.number)).float()
            rows = view.rows(forward.number, len(whole))
            lengths = lengths_of(forward["attention_mask"], *whole.shape[:2])
            gradient = gradients.decode(seen["gradient"]).float()[rows]
            found[forward.number] = Returned(forward.number, whole[rows], gradient, [lengths[row] for row in rows])
    return found


def masked_first_states(view: View) -> list[States]:
    """What stands for the first states of each pass at the host: X₀·R."""
    return _veiled(view) if view.rights.design == "veil" else _first_segments(view)


def _veiled(view: View) -> list[States]:
    return [
        _joined_states(view, pieces, [each["hidden"] for each in pieces], pieces[0]["attention_mask"])
        for pieces in whole_passes(view, "VeiledForward")
    ]


def _first_segments(view: View) -> list[States]:
    masks = masks_of_segments(view)
    return [
        _joined_states(view, pieces, [each["hidden"] for each in pieces], masks.get(pieces[0].number))
        for pieces in whole_passes(view, "SegmentForward")
    ]


def every_row(view: View) -> View:
    """The same view with every row of every pass asked for: what is not to be found may help to find the rest."""
    kind = "VeiledForward" if view.rights.design == "veil" else "SegmentForward"
    unaimed = view.aimed(None)
    return view.aimed({each[0].number: range(len(each[0]["hidden"])) for each in whole_passes(unaimed, kind)})


def blocks_before(view: View) -> int:
    """Blocks of the model that run in the enclave, before the host's first."""
    if view.rights.design != "veil":
        return 0
    return int(view.messages("TrunkPlan")[0]["settings"]["bottom_layers"])


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


def masked_weights(view: View) -> dict[str, Tensor]:
    """Every tensor of the trunk that the host was sent, by name."""
    return {name: value for shard in view.messages("TrunkShard") for name, value in shard["tensors"].items()}


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


def places_in(passes: Sequence[States]) -> list[Int[Tensor, " _"]]:
    """Where in its text each state of every sequence stands, in the order of `joined`."""
    return [places for states in passes for places in states.places]


def has_gaps(places: Sequence[Int[Tensor, " _"]]) -> bool:
    """Whether positions of some text were not sent."""
    return any(int(each[-1]) >= len(each) for each in places)


def require_whole(places: Sequence[Int[Tensor, " _"]], attack: str) -> None:
    """Refuse texts of which positions are missing, for an attack that needs all of them.

    Raises:
        UserError: some are.
    """
    if has_gaps(places):
        raise UserError(
            f"{attack} matches whole texts, and not every position of these was sent",
            hint="learned_inverter guesses what was left out; vocabulary_matching and ridge_inverter leave it out",
        )


def spread(tokens: Sequence[int], places: Int[Tensor, " _"]) -> list[int]:
    """Guesses at the places they are of, `UNKNOWN` between them."""
    found = [UNKNOWN] * (int(places[-1]) + 1)
    for token, place in zip(tokens, places.tolist(), strict=True):
        found[place] = token
    return found
