"""The enclave and the untrusted host: masked weights, masked states, factors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from veiltune.transport.messages.base import JsonObject, Message


@dataclass(frozen=True, slots=True)
class TrunkPlan(Message):
    """What the host needs to build its empty trunk: public architecture, adapter shape, placement, optimiser."""

    config: JsonObject
    settings: JsonObject


@dataclass(frozen=True, slots=True)
class TrunkShard(Message):
    """Obfuscated weights of one block, by parameter name."""

    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Factors(Message):
    """LoRA factors in the obfuscated basis, by parameter name."""

    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class FactorsRequest(Message):
    """Asks the host for its factors in the obfuscated basis."""


@dataclass(frozen=True, slots=True)
class FactorGradientsRequest(Message):
    """Asks the host for the accumulated gradients of its factors; ``clear`` then forgets them."""

    clear: bool


@dataclass(frozen=True, slots=True)
class FactorGradients(Message):
    """Gradients of the LoRA factors in the obfuscated basis."""

    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class PassContext(Message):
    """What attention needs beside the hidden states, none of it secret: positions' rotary tables and the mask."""

    context_id: int
    attention_mask: Tensor | None
    cos: Tensor | None
    sin: Tensor | None


@dataclass(frozen=True, slots=True)
class SegmentForward(Message):
    """Run one operation on masked input.

    ``context_id`` and ``cache_id`` are 0 where there is none; ``keep``: a backward follows, with a gradient for the input if
    ``input_gradient``.
    """

    segment: int
    ticket: int
    context_id: int
    cache_id: int
    keep: bool
    input_gradient: bool
    training: bool
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class SegmentOutput(Message):
    """The segment's outputs, in the order of its linears."""

    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class SegmentBackward(Message):
    """Gradients of one kept segment's outputs. ``ticket`` is that of its forward."""

    ticket: int
    gradients: tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class SegmentGradient(Message):
    """Gradient of the segment's masked input, where it was asked for."""

    gradient: Tensor | None


@dataclass(frozen=True, slots=True)
class Forget(Message):
    """Free a cache (``cache_id`` > 0), or every kept forward and context of the passes so far (0)."""

    cache_id: int
