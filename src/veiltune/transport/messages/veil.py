"""The enclave and the host of a trunk in a rotated basis: whole passes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from veiltune.transport.messages.base import Message


@dataclass(frozen=True, slots=True)
class VeiledForward(Message):
    """Run the trunk on rotated states (batch, seq, d).

    ``ticket`` rises by message. ``cache_id`` is 0 where there is no KV cache. ``keep``: a backward follows, which is answered
    with the input's gradient if ``input_gradient``, else not at all. The mask is (batch, past + seq), absent if all ones;
    position ids are absent where they simply count.
    """

    ticket: int
    cache_id: int
    keep: bool
    input_gradient: bool
    training: bool
    attention_mask: Tensor | None
    position_ids: Tensor | None
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class VeiledOutput(Message):
    """The trunk's output, rotated."""

    ticket: int
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class VeiledBackward(Message):
    """The gradient of one kept forward's output, rotated."""

    ticket: int
    gradient: Tensor


@dataclass(frozen=True, slots=True)
class VeiledGradient(Message):
    """The gradient of that forward's input, rotated."""

    ticket: int
    gradient: Tensor
