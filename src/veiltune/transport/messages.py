"""Every message that crosses between two parties.

A message is a frozen dataclass; `transport.codec` turns it into bytes and back. Which observer may see which kind is not
written here but in each design's ``reveals`` table, and the channels enforce that table: a kind that a design does not
list for a receiver can neither be sent to it nor be accepted by it.

Field types the codec knows: ``int float bool str bytes Tensor``, each optional where marked, tuples of ``int``, ``str`` or
tensors, ``dict[str, Tensor]`` and `JsonObject`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

JsonObject = dict[str, Any]
"""A JSON object: what TOML and JSON can hold, never code."""


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages."""


# --- control: the session's supervisor and each party --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress(Message):
    """A party tells the supervisor of progress: an event's name and plain figures, never data."""

    event: str
    fields: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PartyDone(Message):
    """A party has ended well; ``fields`` holds its share of the result record."""

    fields: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PartyFailed(Message):
    """A party has stopped because of an error."""

    error: str
    message: str
    hint: str | None
    exit_code: int


@dataclass(frozen=True, slots=True)
class Interrupt(Message):
    """The supervisor asks the owner to save a checkpoint at the next step's end and stop."""


# --- both ways ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Goodbye(Message):
    """The sender is done with this link; the receiver may end."""


@dataclass(frozen=True, slots=True)
class Acknowledged(Message):
    """The last request was carried out."""


@dataclass(frozen=True, slots=True)
class EvidenceRequest(Message):
    """Asks the enclave to prove what it is, over a fresh nonce."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Evidence(Message):
    """The enclave's evidence (simulated evidence says so in itself)."""

    evidence: JsonObject


# --- provisioning: the provider's weights -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelCard(Message):
    """What the provider makes public of its model: the architecture's configuration and the weights' fingerprint."""

    config: JsonObject
    fingerprint: str
    num_parameters: int


@dataclass(frozen=True, slots=True)
class TokenizerFiles(Message):
    """The tokenizer's files as bytes, by file name."""

    files: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class WeightShard(Message):
    """Plain weights of one block (or of what stands outside the blocks), by parameter name. ``last`` ends the stream."""

    tensors: dict[str, Tensor]
    last: bool


# --- the owner and whoever runs the training step ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainBatch(Message):
    """One micro-batch: token ids, padding mask, labels (-100 where no loss), and the tokens the step's loss averages over."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    normalizer: int


@dataclass(frozen=True, slots=True)
class EvalBatch(Message):
    """As `TrainBatch`, without gradients."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class BatchLoss(Message):
    """Summed cross-entropy in nats and the number of target tokens it sums over."""

    loss_sum: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class OptimizerStep(Message):
    """Apply the accumulated gradients with this learning rate, clipped to this norm (0: no clipping)."""

    learning_rate: float
    max_grad_norm: float


@dataclass(frozen=True, slots=True)
class StepDone(Message):
    """The step was applied; ``grad_norm`` is the norm before clipping."""

    grad_norm: float


@dataclass(frozen=True, slots=True)
class ScoreBatch(Message):
    """Rows whose labelled tokens are to be scored (labels -100 elsewhere), right-padded."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Scores(Message):
    """Per row: summed log-probability of the labelled tokens, and whether each was the likeliest."""

    log_probs: Tensor
    is_greedy: Tensor


@dataclass(frozen=True, slots=True)
class LogitsRequest(Message):
    """Asks for the logits of every position (verification only)."""

    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True, slots=True)
class Logits(Message):
    """Logits of shape (batch, seq, vocabulary)."""

    logits: Tensor


@dataclass(frozen=True, slots=True)
class GenerateRequest(Message):
    """A prompt and the decoding settings (`transformers` names)."""

    input_ids: Tensor
    settings: JsonObject


@dataclass(frozen=True, slots=True)
class GeneratedToken(Message):
    """One token of a streamed answer; ``last`` closes the stream (``token`` is then -1)."""

    token: int
    last: bool


@dataclass(frozen=True, slots=True)
class GradientsRequest(Message):
    """Asks for the adapter's gradients in the plain basis (verification only)."""


@dataclass(frozen=True, slots=True)
class AdapterRequest(Message):
    """Asks for the adapter in the plain basis."""


@dataclass(frozen=True, slots=True)
class AdapterTensors(Message):
    """LoRA factors (or their gradients) in the plain basis, by PEFT's names."""

    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class SaveState(Message):
    """Write this party's share of the checkpoint of ``step``."""

    step: int


@dataclass(frozen=True, slots=True)
class LoadState(Message):
    """Load this party's share of the checkpoint of ``step``."""

    step: int


@dataclass(frozen=True, slots=True)
class CostRequest(Message):
    """Asks for the figures only this party knows (times, parameter counts)."""


@dataclass(frozen=True, slots=True)
class CostReport(Message):
    """Plain figures, by name."""

    figures: JsonObject


# --- enclave and host: obfuscatune ------------------------------------------------------------------------------------


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


MESSAGES: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        Progress,
        PartyDone,
        PartyFailed,
        Interrupt,
        Goodbye,
        Acknowledged,
        EvidenceRequest,
        Evidence,
        ModelCard,
        TokenizerFiles,
        WeightShard,
        TrainBatch,
        EvalBatch,
        BatchLoss,
        OptimizerStep,
        StepDone,
        ScoreBatch,
        Scores,
        LogitsRequest,
        Logits,
        GenerateRequest,
        GeneratedToken,
        GradientsRequest,
        AdapterRequest,
        AdapterTensors,
        SaveState,
        LoadState,
        CostRequest,
        CostReport,
        TrunkPlan,
        TrunkShard,
        Factors,
        FactorsRequest,
        FactorGradientsRequest,
        FactorGradients,
        PassContext,
        SegmentForward,
        SegmentOutput,
        SegmentBackward,
        SegmentGradient,
        Forget,
    )
}
