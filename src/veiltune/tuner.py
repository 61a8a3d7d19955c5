"""What the owner asks of whoever runs the training step, as methods over one exchange of messages.

`RemoteTuner` asks over a channel. `EngineTuner` is for an owner that runs the training engine itself: nothing crosses.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from veiltune.engine import Engine
from veiltune.errors import ProtocolError
from veiltune.examples import IGNORED
from veiltune.transport.channel import Channel
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
    HandOver,
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

M = TypeVar("M", bound=Message)
Scored = tuple[float, bool]


class Tuner(ABC):
    """The owner's side of the training engine. Token ids are int64 of shape (batch, seq).

    ``holds_state``: all that is trained, and its optimiser, are in this very party.
    """

    holds_state = False

    @abstractmethod
    def _exchange(self, request: Message) -> Iterator[Message]:
        """Send a request and yield what comes back until its answer."""

    def _ask(self, request: Message, answer: type[M]) -> M:
        for reply in self._exchange(request):
            if isinstance(reply, answer):
                return reply
            raise ProtocolError(f"expected {answer.__name__}, got {type(reply).__name__}")
        raise ProtocolError(f"expected {answer.__name__}, got nothing")

    def accumulate(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, normalizer: int) -> float:
        """One micro-batch forward and backward; returns the summed loss in nats."""
        return self._ask(TrainBatch(input_ids, attention_mask, labels, normalizer), BatchLoss).loss_sum

    def step(self, learning_rate: float, max_grad_norm: float = 0.0) -> float:
        """Apply the accumulated gradients; returns their norm."""
        return self._ask(OptimizerStep(learning_rate, max_grad_norm), StepDone).grad_norm

    def evaluate(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[float, int]:
        """Summed loss in nats and number of target tokens, without gradients."""
        answer = self._ask(EvalBatch(input_ids, attention_mask, labels), BatchLoss)
        return answer.loss_sum, answer.num_tokens

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of every position: (batch, seq, vocabulary)."""
        return self._ask(LogitsRequest(input_ids, attention_mask), Logits).logits

    def gradients(self) -> dict[str, Tensor]:
        """Accumulated gradients of the factors, plain basis."""
        return self._ask(GradientsRequest(), AdapterTensors).tensors

    def adapter(self) -> dict[str, Tensor]:
        """The factors, plain basis."""
        return self._ask(AdapterRequest(), AdapterTensors).tensors

    def hand_over(self) -> None:
        """Have the provider get the adapter, as was agreed on."""
        self._ask(HandOver(), Acknowledged)

    def save(self, step: int) -> None:
        """Have every party behind this one write its state of ``step``."""
        self._ask(SaveState(step), Acknowledged)

    def load(self, step: int) -> None:
        """Have every party behind this one go back to its state of ``step``."""
        self._ask(LoadState(step), Acknowledged)

    def figures(self) -> dict[str, Any]:
        """Figures of cost that only the engine knows."""
        return self._ask(CostRequest(), CostReport).figures

    def generate(self, input_ids: Tensor, settings: dict[str, Any]) -> Iterator[int]:
        """Stream an answer's tokens; settings are `transformers`' generation arguments, and ``seed``."""
        for reply in self._exchange(GenerateRequest(input_ids, settings)):
            if not isinstance(reply, GeneratedToken):
                raise ProtocolError(f"expected GeneratedToken, got {type(reply).__name__}")
            if not reply.last:
                yield reply.token

    def score(
        self, pairs: Sequence[tuple[list[int], list[int]]], *, batch_size: int = 16, pad_id: int = 0
    ) -> list[Scored]:
        """Summed log-probability of each continuation after its context, and whether greedy decoding gives it.

        Pairs are sorted by length into batches, right-padded; answers come in the order of ``pairs``.
        """
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        answers: list[Scored] = [(0.0, False)] * len(pairs)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            request = _score_batch([pairs[i] for i in chosen], pad_id)
            reply = self._ask(request, Scores)
            for i, log_prob, greedy in zip(chosen, reply.log_probs.tolist(), reply.is_greedy.tolist(), strict=True):
                answers[i] = (log_prob, greedy)
        return answers


def _score_batch(pairs: Sequence[tuple[list[int], list[int]]], pad_id: int) -> ScoreBatch:
    length = max(len(context) + len(continuation) for context, continuation in pairs)
    ids = torch.full((len(pairs), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(pairs), length), dtype=torch.int64)
    labels = torch.full((len(pairs), length), IGNORED, dtype=torch.int64)
    for row, (context, continuation) in enumerate(pairs):
        end = len(context) + len(continuation)
        ids[row, :end] = torch.tensor([*context, *continuation])
        mask[row, :end] = 1
        labels[row, len(context) : end] = torch.tensor(continuation)
    return ScoreBatch(ids, mask, labels)


class RemoteTuner(Tuner):
    """A tuner at the other end of a channel."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def _exchange(self, request: Message) -> Iterator[Message]:
        self.channel.send(request)
        while True:
            reply = self.channel.recv()
            yield reply
            if not isinstance(reply, GeneratedToken) or reply.last:
                return


class EngineTuner(Tuner):
    """A tuner whose engine is in this very party."""

    holds_state = True

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def _exchange(self, request: Message) -> Iterator[Message]:
        if isinstance(request, GenerateRequest):
            yield from self._streamed(request)
        else:
            yield self.engine.handle(request)

    def _streamed(self, request: GenerateRequest) -> Iterator[Message]:
        """Tokens as the engine emits them: it runs beside, since `transformers` pushes where we pull."""
        emitted: queue.Queue[Message | BaseException] = queue.Queue()

        def run() -> None:
            self.engine.emit = emitted.put
            try:
                emitted.put(self.engine.handle(request))
            except BaseException as error:  # noqa: BLE001 - it is raised again where it can be seen
                emitted.put(error)

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        while True:
            reply = emitted.get()
            if isinstance(reply, BaseException):
                raise reply
            yield reply
            if isinstance(reply, GeneratedToken) and reply.last:
                worker.join()
                return


def serve(channel: Channel, handle: Callable[[Message], Message], until: type[Message]) -> None:
    """Answer requests until the peer says it is done."""
    while True:
        request = channel.recv()
        if isinstance(request, until):
            return
        channel.send(handle(request))
