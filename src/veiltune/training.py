"""The training loop, run by the data owner: order of examples, schedule, evaluation, checkpoints, interruption.

The loop is the same for every design; where gradients come from is the tuner's business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from veiltune.batching import Batch, batches, steps_per_epoch
from veiltune.config import Config, TrainConfig
from veiltune.errors import PeerLostError, TrainingError
from veiltune.examples import TokenizedExample
from veiltune.results import write_json
from veiltune.tuner import Tuner

Report = Callable[[str, dict[str, Any]], None]
COMMIT = "checkpoint.json"


@dataclass
class History:
    """What a run has done so far; part of every checkpoint."""

    step: int = 0
    loss: list[float] = field(default_factory=list)
    validation_loss: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    interrupted: bool = False


def learning_rates(train: TrainConfig, total_steps: int) -> list[float]:
    """Learning rate of every step, by `transformers`' schedules."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    scheduler = get_scheduler(name, optimizer, train.warmup_steps, total_steps)
    rates: list[float] = []
    for _ in range(total_steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return rates


def total_steps(train: TrainConfig, num_examples: int) -> int:
    """Optimiser steps of a run: ``steps``, else as many as ``epochs`` need."""
    if train.steps is not None:
        return train.steps
    return max(1, math.ceil(train.epochs * steps_per_epoch(num_examples, train.batch_size) / train.accumulate))


class Trainer:
    """One run of the loop.

    Args:
        tuner: whoever computes.
        config: the run's configuration.
        examples: tokenised training examples.
        validation: tokenised held-out examples, possibly none.
        pad_id: token for padding.
        report: told of each step, evaluation and checkpoint.
        interrupted: asked after each step whether to save and stop.
    """

    def __init__(
        self,
        tuner: Tuner,
        config: Config,
        examples: Sequence[TokenizedExample],
        validation: Sequence[TokenizedExample],
        *,
        pad_id: int,
        report: Report,
        interrupted: Callable[[], bool],
    ) -> None:
        self.tuner = tuner
        self.config = config
        self.examples = examples
        self.validation = validation
        self.pad_id = pad_id
        self.report = report
        self.interrupted = interrupted
        self.history = History()
        self.total = total_steps(config.train, len(examples))
        self._saved = 0
        self._is_stepping = False

    def resume(self, commit: dict[str, Any]) -> None:
        """Go back to a committed checkpoint."""
        known = History.__dataclass_fields__
        self.history = History(**{name: value for name, value in commit["history"].items() if name in known})
        self.history.interrupted = False
        self.tuner.load(self.history.step)
        self._saved = self.history.step
        self.report("resumed", {"step": self.history.step, "total_steps": self.total})

    def run(self) -> History:
        """Train to the last step, or to an interruption.

        Raises:
            TrainingError: the loss or its gradient became infinite or not a number.
        """
        train = self.config.train
        rates = learning_rates(train, self.total)
        stream = self._batches(self.history.step * train.accumulate)
        while self.history.step < self.total:
            group = [next(stream) for _ in range(train.accumulate)]
            try:
                self._step(group, rates[self.history.step])
            except PeerLostError:
                self._keep()
                raise
            step = self.history.step
            last = step == self.total
            if self.validation and (last or (train.evaluate_every and step % train.evaluate_every == 0)):
                self._validate()
            self.history.interrupted = not last and self.interrupted()
            if last or self.history.interrupted or (train.checkpoint_every and step % train.checkpoint_every == 0):
                self.checkpoint()
            if self.history.interrupted:
                break
        return self.history

    def _batches(self, skip: int) -> Iterator[Batch]:
        return batches(
            self.examples,
            self.config.train.batch_size,
            seed=self.config.seed,
            steps=self.total * self.config.train.accumulate,
            pad_id=self.pad_id,
            start=skip,
        )

    def _step(self, group: Sequence[Batch], learning_rate: float) -> None:
        start = time.perf_counter()
        targets = sum(batch.num_target_tokens for batch in group)
        loss = 0.0
        for batch in group:
            loss += self.tuner.accumulate(batch.input_ids, batch.attention_mask, batch.labels, targets) / targets
        self._require_finite("loss", loss, self.history.step + 1)
        self._is_stepping = True
        norm = self.tuner.step(learning_rate, self.config.train.max_grad_norm)
        self._require_finite("gradient norm", norm, self.history.step + 1)
        seconds = time.perf_counter() - start
        tokens = sum(int(batch.attention_mask.sum()) for batch in group)
        history = self.history
        history.step += 1
        history.loss.append(loss)
        history.seconds.append(seconds)
        history.tokens += tokens
        self._is_stepping = False
        self.report(
            "step",
            {
                "step": history.step,
                "total_steps": self.total,
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": learning_rate,
                "tokens_per_second": tokens / seconds,
            },
        )

    def _require_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {what} of step {step} is {value}; the last checkpoint is kept",
                hint="lower train.learning_rate, set train.max_grad_norm, or check the data and the design's options",
            )

    def _validate(self) -> None:
        loss_sum, num_tokens = 0.0, 0
        for batch in batches(self.validation, self.config.train.batch_size, seed=None, epochs=1, pad_id=self.pad_id):
            loss, tokens = self.tuner.evaluate(batch.input_ids, batch.attention_mask, batch.labels)
            loss_sum, num_tokens = loss_sum + loss, num_tokens + tokens
        value = loss_sum / max(1, num_tokens)
        self._require_finite("validation loss", value, self.history.step)
        self.history.validation_loss.append((self.history.step, value))
        self.report("validation", {"step": self.history.step, "loss": value})

    def _keep(self) -> None:
        """A peer is gone in the middle of a step: where this party holds all that is trained, the steps before are whole.

        Unless the optimiser was at work: then what is trained may be a step ahead of the history, and nothing is kept.
        """
        if self.tuner.holds_state and not self._is_stepping and self.history.step > self._saved:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Save every party's state, then commit."""
        self.tuner.save(self.history.step)
        self._saved = self.history.step
        commit = {
            "schema": 1,
            "fingerprint": self.config.run_fingerprint(),
            "step": self.history.step,
            "history": vars(self.history),
        }
        write_json(Path(self.config.output) / COMMIT, commit)
        self.report("checkpoint", {"step": self.history.step})
