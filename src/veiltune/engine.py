"""The training engine: forward, loss, backward, step, scoring and generation on one causal language model.

The engine runs wherever the residual stream is: in the clear under `local`, in the enclave under `obfuscatune`. What differs
between designs stands behind `Backend`; what the owner asks for comes as messages and is answered by `Engine.handle`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from veiltune.checkpoints import StateStore, optimizer_tensors, restore_optimizer
from veiltune.errors import ProtocolError
from veiltune.examples import IGNORED
from veiltune.models.head_loss import can_be_chunked, head_loss
from veiltune.transport.messages import (
    Acknowledged,
    AdapterRequest,
    AdapterTensors,
    BatchLoss,
    CostReport,
    CostRequest,
    EvalBatch,
    GeneratedToken,
    GenerateRequest,
    GradientsRequest,
    LoadState,
    Logits,
    LogitsRequest,
    Message,
    OptimizerStep,
    SaveState,
    ScoreBatch,
    Scores,
    StepDone,
    TrainBatch,
)


class Backend(ABC):
    """Where the LoRA factors and the optimiser are, as far as the engine need know."""

    @abstractmethod
    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Apply the accumulated gradients and forget them; returns their norm before clipping."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Accumulated gradients of the factors in the plain basis."""

    @abstractmethod
    def factors(self) -> dict[str, Tensor]:
        """The factors in the plain basis."""

    @abstractmethod
    def save(self, step: int) -> None:
        """Write the state of ``step``."""

    @abstractmethod
    def load(self, step: int) -> None:
        """Go back to the state of ``step``."""

    def end_of_pass(self) -> None:  # noqa: B027 - most backends keep nothing between passes
        """A forward pass and its backward are over."""

    def end_of_generation(self) -> None:  # noqa: B027
        """A generation is over; its cache can go."""


def clip_and_step(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], learning_rate: float, max_grad_norm: float
) -> float:
    """One optimiser step at this learning rate, gradients clipped to a global norm (0: not) and then forgotten."""
    values = list(parameters.values())
    norm = torch.nn.utils.clip_grad_norm_(values, max_grad_norm if max_grad_norm > 0 else float("inf"))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


class ParameterBackend(Backend):
    """Factors and optimiser in this process, in the plain basis."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, store: StateStore
    ) -> None:
        self.parameters = dict(parameters)
        self.optimizer = optimizer
        self.store = store

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """See `Backend.step`."""
        return clip_and_step(self.optimizer, self.parameters, learning_rate, max_grad_norm)

    def gradients(self) -> dict[str, Tensor]:
        """See `Backend.gradients`."""
        return {
            name: torch.zeros_like(value) if value.grad is None else value.grad
            for name, value in self.parameters.items()
        }

    def factors(self) -> dict[str, Tensor]:
        """See `Backend.factors`."""
        return {name: value.detach() for name, value in self.parameters.items()}

    def save(self, step: int) -> None:
        """See `Backend.save`."""
        self.store.save(step, optimizer_tensors(self.optimizer, self.parameters))

    def load(self, step: int) -> None:
        """See `Backend.load`."""
        restore_optimizer(self.optimizer, self.parameters, self.store.load(step))


def target_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the head reads at the labelled positions alone: the head is by far the widest matrix, and the others need none.

    Args:
        model: a causal language model of `transformers`.
        input_ids: (batch, seq).
        attention_mask: (batch, seq).
        labels: (batch, seq), `IGNORED` where nothing is predicted.

    Returns:
        states (targets, d), their labels (targets,), their rows (targets,).
    """
    hidden = getattr(model, model.base_model_prefix)(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False
    )[0]
    wanted = labels[:, 1:] != IGNORED
    return hidden[:, :-1][wanted], labels[:, 1:][wanted], torch.nonzero(wanted)[:, 0]


def target_logits(model: Any, states: Tensor) -> Tensor:
    """Logits (targets, vocabulary) of `target_states`, in float32 or better."""
    logits = model.get_output_embeddings()(states)
    return logits if logits.dtype == torch.float64 else logits.float()


def summed_loss(model: Any, states: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of `target_states`, summed; without a tensor of all logits where the head is frozen and plain."""
    head = model.get_output_embeddings()
    if can_be_chunked(head):
        return head_loss(states, head.weight, labels)
    return functional.cross_entropy(target_logits(model, states), labels, reduction="sum")


class Engine:
    """Answers the owner's requests on one model.

    Args:
        model: a causal language model of `transformers`, plain or with remote parts.
        backend: where its factors and optimiser are.
        device: where tensors of a request go.
        emit: sends one message to the owner outside the request's answer (streamed tokens).
        penalty: a term of the objective beside cross-entropy, asked for after each training forward.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        device: torch.device,
        emit: Callable[[Message], None],
        penalty: Callable[[], Tensor | None] | None = None,
    ) -> None:
        self.model: Any = model
        self.backend = backend
        self.device = device
        self.emit = emit
        self.penalty = penalty
        self._handlers: dict[type[Message], Callable[[Any], Message]] = {
            TrainBatch: self.accumulate,
            EvalBatch: self.evaluate,
            OptimizerStep: self.step,
            ScoreBatch: self.score,
            LogitsRequest: self.logits,
            GenerateRequest: self.generate,
            GradientsRequest: lambda _: AdapterTensors(self.backend.gradients()),
            AdapterRequest: lambda _: AdapterTensors(self.backend.factors()),
            SaveState: self.save,
            LoadState: self.load,
            CostRequest: lambda _: CostReport({}),
        }

    def handle(self, request: Message) -> Message:
        """Carry out one request.

        Raises:
            ProtocolError: the message is no request to an engine.
        """
        handler = self._handlers.get(type(request))
        if handler is None:
            raise ProtocolError(f"the training engine does not answer {type(request).__name__}")
        return handler(request)

    def answer_with(self, kind: type[Message], handler: Callable[[Any], Message]) -> None:
        """Have another answer to one kind of request, or an answer to one more kind."""
        self._handlers[kind] = handler

    def _targets(self, request: TrainBatch | EvalBatch | ScoreBatch) -> tuple[Tensor, Tensor, Tensor]:
        return target_states(
            self.model,
            request.input_ids.to(self.device),
            request.attention_mask.to(self.device),
            request.labels.to(self.device),
        )

    def accumulate(self, request: TrainBatch) -> BatchLoss:
        """Forward and backward; gradients add up until the next step."""
        self.model.train()
        states, labels, _ = self._targets(request)
        loss = summed_loss(self.model, states, labels)
        penalty = None if self.penalty is None else self.penalty()
        if torch.isfinite(loss):
            objective = loss / request.normalizer
            if penalty is not None:  # a mean over micro-batches, weighted as the loss is
                objective = objective + penalty * (labels.numel() / request.normalizer)
            objective.backward()
        self.backend.end_of_pass()
        return BatchLoss(float(loss.detach()), int(labels.numel()))

    @torch.no_grad()
    def evaluate(self, request: EvalBatch) -> BatchLoss:
        """Forward only."""
        self.model.eval()
        states, labels, _ = self._targets(request)
        self.backend.end_of_pass()
        return BatchLoss(float(summed_loss(self.model, states, labels)), int(labels.numel()))

    def step(self, request: OptimizerStep) -> StepDone:
        """Apply the accumulated gradients."""
        return StepDone(self.backend.step(request.learning_rate, request.max_grad_norm))

    @torch.no_grad()
    def score(self, request: ScoreBatch) -> Scores:
        """Log-probability of each row's labelled tokens."""
        self.model.eval()
        states, labels, rows = self._targets(request)
        self.backend.end_of_pass()
        logits = target_logits(self.model, states)
        picked = -functional.cross_entropy(logits, labels, reduction="none").double().cpu()
        wrong = (logits.argmax(-1) != labels).cpu()
        count = request.input_ids.shape[0]
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, rows.cpu(), picked)
        misses = torch.zeros(count, dtype=torch.int64).index_add_(0, rows.cpu(), wrong.long())
        return Scores(sums, misses == 0)

    @torch.no_grad()
    def logits(self, request: LogitsRequest) -> Logits:
        """Logits of every position."""
        self.model.eval()
        output = self.model(
            input_ids=request.input_ids.to(self.device),
            attention_mask=request.attention_mask.to(self.device),
            use_cache=False,
        )
        self.backend.end_of_pass()
        return Logits(output.logits.cpu())

    @torch.no_grad()
    def generate(self, request: GenerateRequest) -> GeneratedToken:
        """Generate with `transformers`' own loop and cache, each token emitted as it comes."""
        self.model.eval()
        settings = dict(request.settings)
        seed = settings.pop("seed", None)
        if seed is not None:
            torch.manual_seed(int(seed))
        input_ids = request.input_ids.to(self.device)
        self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            streamer=_TokenStreamer(self.emit),
            use_cache=True,
            **settings,
        )
        self.backend.end_of_generation()
        return GeneratedToken(-1, last=True)

    def save(self, request: SaveState) -> Acknowledged:
        """Write the state of a step."""
        self.backend.save(request.step)
        return Acknowledged()

    def load(self, request: LoadState) -> Acknowledged:
        """Go back to the state of a step."""
        self.backend.load(request.step)
        return Acknowledged()


class _TokenStreamer:
    """`transformers` calls `put` with the prompt first, then with each new token."""

    def __init__(self, emit: Callable[[Message], None]) -> None:
        self._emit = emit
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.flatten().tolist():
            self._emit(GeneratedToken(int(token), last=False))

    def end(self) -> None:
        """Nothing is held back."""
