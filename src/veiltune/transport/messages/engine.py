"""The data owner and whoever runs the training step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from veiltune.transport.messages.base import JsonObject, Message


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
class HandOver(Message):
    """Asks the party that trains to send the provider the adapter, as was agreed on."""


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
