"""The data owner and the provider's trunk, where the model is cut between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from veiltune.transport.messages.base import JsonObject, Message


@dataclass(frozen=True, slots=True)
class SplitRequest(Message):
    """What the owner wants of the trunk: terms to agree on, item by item (cut, weights' fingerprint, wire, …).

    ``with_layers``: it has no layers yet, so they are to follow, with card and tokenizer; false when it comes back.
    """

    terms: JsonObject
    with_layers: bool


@dataclass(frozen=True, slots=True)
class SplitAccepted(Message):
    """The provider agrees; ``session`` names this owner's session in the provider's log. The owner's layers follow."""

    session: str


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """The provider refuses the last message and ends this session: the kind of error, what is wrong, how to put it right."""

    error: str
    message: str
    hint: str | None


@dataclass(frozen=True, slots=True)
class TrunkForward(Message):
    """Run the trunk on encoded states (`privacy.quantisation`).

    ``ticket`` rises by message. ``cache_id`` is 0 where there is no KV cache. ``keep``: a backward follows. The mask is
    (batch, past + seq), absent if all ones; position ids are absent where they simply count.
    """

    ticket: int
    cache_id: int
    keep: bool
    training: bool
    attention_mask: Tensor | None
    position_ids: Tensor | None
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class TrunkOutput(Message):
    """The trunk's output, encoded."""

    ticket: int
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class TrunkBackward(Message):
    """The gradient of one kept forward's output, encoded."""

    ticket: int
    gradient: Tensor


@dataclass(frozen=True, slots=True)
class TrunkGradient(Message):
    """The gradient of that forward's input, encoded."""

    ticket: int
    gradient: Tensor


@dataclass(frozen=True, slots=True)
class EmulatorRequest(Message):
    """Asks for the emulator of the trunk that was agreed on."""


@dataclass(frozen=True, slots=True)
class EmulatorShard(Message):
    """Part of an emulator; the first carries its card. ``last`` ends the stream."""

    card: JsonObject
    tensors: dict[str, Tensor]
    last: bool


@dataclass(frozen=True, slots=True)
class PlugIn(Message):
    """The owner returns what it trained, for the provider to put into the full model."""

    method: str
    tensors: dict[str, Tensor]
